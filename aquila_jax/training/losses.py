"""What is minimised: cross-entropy and the terms of LossConfig.

All parts of `LossTerms` are sums that are already divided by the totals of the
*whole* batch, so those of microbatches add up to those of the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from aquila_jax.core.experiment_config import LossConfig
from aquila_jax.core.types import Batch, Leaf, RoutingStats
from aquila_jax.layers.target_scores import TargetScores
from aquila_jax.training.balance import BalanceInputs, make_rule


class BatchTotals(struct.PyTreeNode):
  """What the sums of a batch are divided by."""

  weight: Leaf  # float []; sum of the target weights, at least tiny
  tokens: Leaf  # float []; tokens that are not padding, at least 1


class LossTerms(struct.PyTreeNode):
  """The loss of a batch, or a microbatch's share of it. Additive."""

  total: Leaf  # float []; what is differentiated
  cross_entropy: Leaf  # float []; nats a token
  lm_z: Leaf  # float []; mean logsumexp(LM logits)^2
  lm_max_z: Leaf  # float []; mean max(LM logits)^2
  weight: Leaf  # float []; sum of the target weights
  language_nats: Leaf  # float [languages]; weighted sum, not a mean
  language_weight: Leaf  # float [languages]
  routing: RoutingStats | None  # stacked over MoE layers; None when dense
  balance: Leaf | None = None  # float [L]; the balance loss; None when dense


def batch_totals(batch: Batch) -> BatchTotals:
  """The totals of a whole batch, before it is cut into microbatches."""
  return BatchTotals(
    # A batch without any target has loss 0, not 0 / 0.
    weight=jnp.maximum(jnp.sum(batch.weights), 1e-6),
    tokens=jnp.maximum(_num_tokens(batch), 1.0),
  )


def _num_tokens(batch: Batch) -> Float[Array, ""]:
  return jnp.sum((batch.segments > 0).astype(jnp.float32))


def loss_terms(
  scores: TargetScores,
  routing: RoutingStats | None,
  *,
  batch: Batch,
  totals: BatchTotals,
  config: LossConfig,
  num_languages: int,
  balance: BalanceInputs | None = None,
) -> LossTerms:
  """The terms of one microbatch.

  With token weights w, W their sum over the whole batch, z = logsumexp(logits):

    cross_entropy = sum w (z - logits[target]) / W
    lm_z = sum w z^2 / W          (PaLM, arXiv 2204.02311, section 5)
    lm_max_z = sum w max(logits)^2 / W  (Baichuan 2, arXiv 2309.10305)
    total = cross_entropy + mean over MoE layers of (balance * balance loss +
      router_z * z_loss) + lm_z and lm_max_z times their weights

  The routing of a microbatch counts by its share of the batch's tokens. For the
  z-loss, the load and all other means that is exact; the balance loss is a
  product of two means: training/balance.py.

  Args:
    scores: of the microbatch's targets.
    routing: stacked over the layers with experts; None when dense.
    batch: the microbatch.
    totals: of the whole batch.
    config: the weights of the terms.
    num_languages: I, above every language index of the batch.
    balance: what the balance loss needs of other microbatches.

  Returns:
    The microbatch's share of every term.
  """
  weights = batch.weights.astype(scores.z.dtype)
  nats = weights * (scores.z - scores.target)
  total_weight = totals.weight.astype(scores.z.dtype)
  cross_entropy = jnp.sum(nats) / total_weight
  lm_z = jnp.sum(weights * jnp.square(scores.z)) / total_weight
  lm_max_z = jnp.sum(weights * jnp.square(scores.largest)) / total_weight

  total = cross_entropy
  if config.lm_z:
    total += config.lm_z * lm_z
  if config.lm_max_z:
    total += config.lm_max_z * lm_max_z
  per_layer = None
  if routing is not None:
    routing = shared_routing(routing, batch=batch, totals=totals)
    balance = balance or BalanceInputs()
    per_layer = make_rule(config.balance_over).loss(routing, balance)
    if balance.weights is None:
      total += config.balance * jnp.mean(per_layer)
    else:
      total += jnp.mean(balance.weights.astype(scores.z.dtype) * per_layer)
    total += config.router_z * jnp.mean(routing.z_loss)

  def by_language(values: Float[Array, "B T"]) -> Float[Array, "I"]:
    # Not a scatter, for which a TPU sorts all tokens.
    every = jnp.arange(num_languages, dtype=batch.languages.dtype)
    here = batch.languages[None] == every[:, None, None]  # (I, B, T)
    return jnp.sum(jnp.where(here, values, 0.0), axis=(1, 2))

  return LossTerms(
    total=total,
    cross_entropy=cross_entropy,
    lm_z=lm_z,
    lm_max_z=lm_max_z,
    weight=jnp.sum(weights),
    language_nats=by_language(nats),
    language_weight=by_language(weights),
    routing=routing,
    balance=per_layer,
  )


def shared_routing(
  routing: RoutingStats, *, batch: Batch, totals: BatchTotals
) -> RoutingStats:
  """The means of a microbatch times its share of the batch's tokens."""
  dtype = routing.load.dtype
  share = _num_tokens(batch).astype(dtype) / totals.tokens.astype(dtype)
  return jax.tree.map(lambda mean: share * mean, routing)
