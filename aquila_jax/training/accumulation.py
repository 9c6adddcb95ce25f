"""Gradient and loss terms of a batch, in one piece or in microbatches.

What adds up does so exactly (losses.py). The load of the balance loss does not
(balance.py): under `balance_over="global"` all microbatches are first read
forward for it. That pass stops before the LM head, and a step takes 4/3 of the
FLOPs, less the head's share (planning/counting.py, which counts it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Leaf, Params, RoutingStats
from aquila_jax.layers.moe import router
from aquila_jax.models.decoder_lm import DecoderLM
from aquila_jax.training import losses
from aquila_jax.training.balance import BalanceInputs
from aquila_jax.training.state import widen


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossGradient:
  """The gradient of a batch's loss, as a pure function."""

  config: TrainConfig  # of the stage; accumulation and loss terms
  model: ModelConfig
  num_languages: int  # above every language index of a batch
  # Of the routers' noise, which is a function of it, of the step, the layer and
  # the number of the microbatch.
  seed: int = 0

  def __call__(
    self,
    params: Params,
    batch: Batch,
    *,
    step: Int[Array, ""],
    mask_value: Float[Array, ""] | None = None,
    balance_weights: Float[Array, "L"] | None = None,
  ) -> tuple[Params, losses.LossTerms]:
    """The gradients, at least float32, and the terms of the whole batch.

    Args:
      params: of the model.
      batch: the whole of it.
      step: of the stage.
      mask_value: of a growth mask.
      balance_weights: of the balance loss, where they adapt.

    Returns:
      Gradients and terms.
    """
    passes = _Passes(
      of=self,
      params=params,
      totals=losses.batch_totals(batch),
      step=step,
      mask_value=mask_value,
    )
    balance = BalanceInputs(weights=balance_weights)
    count = self.config.num_microbatches
    if count == 1:
      return passes.gradient(batch, jnp.zeros((), jnp.int32), balance)
    parts = split(batch, count), jnp.arange(count, dtype=jnp.int32)
    if self.config.has_load_pass(self.model):
      balance = balance.replace(total=_summed(passes.load, parts))
    return _accumulated(passes.gradient, parts, balance=balance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Passes:
  """The passes of one step over its microbatches."""

  of: LossGradient
  params: Params
  totals: losses.BatchTotals  # of the whole batch
  step: Leaf
  mask_value: Leaf | None

  def forward(self, params: Params, part: Batch, number: Leaf) -> Any:
    """What the decoder answers, with the noise of training."""
    moe, rngs = self.of.model.moe, None
    if moe is not None and moe.is_noisy:
      rngs = {router.RNG: _noise_key(self.of.seed, self.step, number)}
    return DecoderLM(self.of.model).apply(
      {"params": params},
      part.tokens,
      positions=part.positions,
      segments=part.segments,
      mask_value=self.mask_value,
      groups=self._languages(part),
      targets=part.targets,
      rngs=rngs,
    )

  def _languages(self, part: Batch) -> Float[Array, "B T I"] | None:
    """Of a mixture, whose load is logged a language."""
    if self.of.model.moe is None:
      return None
    return jax.nn.one_hot(part.languages, self.of.num_languages)

  def load(self, part: Batch, number: Leaf) -> Float[Array, "L E"]:
    """A microbatch's share of the load; nothing behind the routers counts."""
    routing = self.forward(self.params, part, number).routing
    return losses.shared_routing(routing, batch=part, totals=self.totals).load

  def gradient(
    self, part: Batch, number: Leaf, balance: BalanceInputs
  ) -> tuple[Params, losses.LossTerms]:
    """A microbatch's share of gradients and terms."""

    def loss_fn(params):
      out = self.forward(params, part, number)
      terms = losses.loss_terms(
        out.scores,
        out.routing,
        batch=part,
        totals=self.totals,
        config=self.of.config.loss,
        num_languages=self.of.num_languages,
        balance=balance,
      )
      return terms.total, terms

    grads, terms = jax.grad(loss_fn, has_aux=True)(self.params)
    return widen(grads), terms


def _noise_key(
  seed: int, step: Int[Array, ""], number: Int[Array, ""]
) -> jax.Array:
  """Of a microbatch; Flax makes one of it for each layer."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.fold_in(key, number)


def split(batch: Batch, count: int) -> Batch:
  """The batch as [count, B / count, T].

  Row i goes to microbatch i mod n, so that a batch that is sharded over its
  rows is cut without moving any between devices.
  """

  def cut(leaf):
    # (B, T) -> (B/n, n, T) -> (n, B/n, T)
    return jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1)

  return jax.tree.map(cut, batch)


def _summed(
  load_fn: Callable[[Batch, Int[Array, ""]], Float[Array, "L E"]],
  parts: tuple[Batch, Leaf],
) -> Float[Array, "L E"]:
  """The load of the whole batch, without a gradient."""

  def add(total, part):
    return total + load_fn(*part), None

  shape = jax.eval_shape(load_fn, *_first(parts))
  return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), parts)[0]


def _accumulated(
  part_gradient: Callable[..., tuple[Params, losses.LossTerms]],
  parts: tuple[Batch, Leaf],
  *,
  balance: BalanceInputs,
) -> tuple[Params, losses.LossTerms]:
  """Gradients and terms summed over the microbatches, at least float32."""

  def add(sums, part):
    routing: RoutingStats | None = sums[1].routing
    so_far = None if routing is None else routing.load
    found = part_gradient(*part, balance.replace(so_far=so_far))
    return jax.tree.map(jnp.add, sums, found), None

  shapes = jax.eval_shape(part_gradient, *_first(parts), balance)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, parts)[0]


def _first(parts: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf[0], parts)
