"""Gradient and loss terms of a batch, in one piece or in microbatches.

What adds up does so exactly (losses.py). The load of the balance loss does not
(balance.py): under `balance_over="global"` all microbatches are first read
forward for it. That pass stops before the LM head, and a step takes 4/3 of the
FLOPs, less the head's share (planning/counting.py, which counts it).
"""

from __future__ import annotations

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

# (parameters, batch, step, mask value, balance weights) -> gradients and terms.
LossGradient = Callable[..., tuple[Params, losses.LossTerms]]


def make_loss_gradient(
  config: TrainConfig,
  *,
  model: ModelConfig,
  num_languages: int,
  seed: int = 0,
) -> LossGradient:
  """The gradient of a batch's loss, as a pure function.

  Args:
    config: of the stage; accumulation and loss terms.
    model: the architecture.
    num_languages: above every language index of a batch.
    seed: of the routers' noise, which is a function of it, of the step, the
      layer and the number of the microbatch.

  Returns:
    A function of parameters, batch and, by name, `step` (int []), `mask_value`
    (float [] or None) and `balance_weights` (float [L] or None). It gives the
    gradients, at least float32, and the terms of the whole batch.
  """
  decoder = DecoderLM(model)
  count = config.num_microbatches
  is_noisy = model.moe is not None and model.moe.is_noisy

  def gradient(params, batch, *, step, mask_value=None, balance_weights=None):
    totals = losses.batch_totals(batch)

    def forward(params, part, number) -> Any:
      rngs = {router.RNG: _noise_key(seed, step, number)} if is_noisy else None
      return decoder.apply(
        {"params": params},
        part.tokens,
        positions=part.positions,
        segments=part.segments,
        mask_value=mask_value,
        rngs=rngs,
      )

    def loss_fn(params, part, number, balance):
      out = forward(params, part, number)
      terms = losses.loss_terms(
        out.logits,
        out.routing,
        batch=part,
        totals=totals,
        config=config.loss,
        num_languages=num_languages,
        balance=balance,
      )
      return terms.total, terms

    def part_gradient(part, number, balance):
      grads, terms = jax.grad(loss_fn, has_aux=True)(
        params, part, number, balance
      )
      return widen(grads), terms

    def part_load(part, number):
      routing = forward(params, part, number).routing
      return losses.shared_routing(routing, batch=part, totals=totals).load

    balance = BalanceInputs(weights=balance_weights)
    if count == 1:
      return part_gradient(batch, jnp.zeros((), jnp.int32), balance)
    parts = split(batch, count), jnp.arange(count, dtype=jnp.int32)
    if config.has_load_pass(model):
      balance = balance.replace(total=_summed(part_load, parts))
    return _accumulated(part_gradient, parts, balance=balance)

  return gradient


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
