"""Losses and load of one layer, over tokens that are not padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from aquila_jax.core.types import Leaf, RoutingStats
from aquila_jax.layers.moe.router import Affinity


class RoutingSums(struct.PyTreeNode):
  """Sums over the tokens of each of B rows, or of all; padding is in none."""

  counts: Leaf  # float [B E]; tokens that were meant to meet an expert
  probability: Leaf  # float [B E]
  entropy: Leaf  # float []; of a token's probabilities, no gradient
  z: Leaf  # float []; logsumexp(x W)^2


def summed(
  affinity: Affinity,
  probability: Float[Array, "M E"],
  *,
  assigned: Bool[Array, "M E"],
  num_rows: int,
) -> RoutingSums:
  """The sums of a choice that comes without them.

  Args:
    affinity: of the router.
    probability: p, of the router's order.
    assigned: who was meant to meet whom; False for padding.
    num_rows: B; M tokens are as many rows of T.

  Returns:
    The sums.
  """
  valid = affinity.valid.astype(probability.dtype)

  def by_row(values: Float[Array, "M E"]) -> Float[Array, "B E"]:
    return jnp.sum(values.reshape(num_rows, -1, values.shape[-1]), axis=1)

  still = jax.lax.stop_gradient(probability)
  entropy = -jnp.sum(jax.scipy.special.xlogy(still, still), axis=-1)
  return RoutingSums(
    counts=by_row(assigned.astype(probability.dtype)),
    probability=by_row(probability * valid[:, None]),
    entropy=jnp.sum(entropy * valid),
    z=squared_logsumexp(affinity),
  )


def squared_logsumexp(affinity: Affinity) -> Float[Array, ""]:
  """The sum of logsumexp(x W)^2 over tokens that are not padding."""
  z = jax.nn.logsumexp(affinity.plain, axis=-1)
  return jnp.sum(jnp.square(z) * affinity.valid.astype(z.dtype))


def routing_stats(
  sums: RoutingSums,
  *,
  valid: Bool[Array, "*tokens"],
  top_gate: Float[Array, "*tokens"],
  dropped: Float[Array, ""],
  group_counts: Float[Array, "I E"] | None = None,
) -> RoutingStats:
  """What the layer says of its routing.

  With f_i the share of all assignments that expert i gets, and P_i the mean of
  p_i over tokens, the balance loss is E sum_i f_i P_i (Switch Transformer,
  arXiv 2101.03961, eq. 4, with f over all A choices): 1 when balanced. The
  product is taken where the batch is known that f is of (training/balance.py).
  `sequence_balance` is that of each of the B rows (DeepSeek-V3, arXiv
  2412.19437, eqs. 17-20), mean over rows by their tokens.

    z_loss = mean logsumexp(x W)^2         (ST-MoE, arXiv 2202.08906, eq. 5)
    entropy = mean of -sum_i p_i log p_i

  f counts what was chosen, whether or not a slot was found, and carries no
  gradient.

  Args:
    sums: over the tokens of B rows.
    valid: False for padding.
    top_gate: a token's largest gate.
    dropped: tokens that the dispatcher could not serve.
    group_counts: of `sums.counts`, those of tokens of each group.

  Returns:
    The layer's statistics.
  """
  num_experts = sums.counts.shape[-1]
  is_token = valid.astype(sums.probability.dtype)
  num_tokens = jnp.maximum(jnp.sum(is_token), 1)
  counts = sums.counts.astype(sums.probability.dtype)
  row_load = counts / jnp.maximum(_total(counts), 1)
  # Tokens of the row * sum f P.
  rows = jnp.sum(row_load * sums.probability, axis=-1)
  load = jnp.sum(counts, axis=0)
  num_assigned = jnp.maximum(_total(load), 1)
  group_load = None
  if group_counts is not None:
    group_load = jax.lax.stop_gradient(group_counts) / num_assigned[None]
  return RoutingStats(
    load=load / num_assigned,
    probability=jnp.sum(sums.probability, axis=0) / num_tokens,
    sequence_balance=num_experts * jnp.sum(rows) / num_tokens,
    z_loss=sums.z / num_tokens,
    entropy=sums.entropy / num_tokens,
    top_gate=jnp.sum(jax.lax.stop_gradient(top_gate) * is_token) / num_tokens,
    dropped=dropped / num_tokens,
    group_load=group_load,
  )


def no_routing(num_experts: int) -> RoutingStats:
  """Zeros, of a layer that has routed nothing."""
  zero, zeros = jnp.zeros(()), jnp.zeros(num_experts)
  return RoutingStats(
    load=zeros,
    probability=zeros,
    sequence_balance=zero,
    z_loss=zero,
    entropy=zero,
    top_gate=zero,
    dropped=zero,
  )


def _total(counts: Float[Array, "*B E"]) -> Float[Array, "*B 1"]:
  return jnp.sum(counts, axis=-1, keepdims=True)
