"""The pure training step: loss and gradient, update, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Leaf, Params, RoutingStats, TrainState
from aquila_jax.models.decoder_lm import DecoderLM
from aquila_jax.sharding.mesh import batch_sharding
from aquila_jax.training import losses
from aquila_jax.training.freezing import select
from aquila_jax.training.growth_mask import mask_schedule
from aquila_jax.training.optimizers import Schedule
from aquila_jax.training.state import widen


class StepMetrics(struct.PyTreeNode):
  """What one step says of itself. Stays on the device until it is logged."""

  total_loss: Leaf  # float []; cross-entropy and all terms
  loss: Leaf  # float []; cross-entropy, nats a token
  lm_z: Leaf  # float []
  lm_max_z: Leaf  # float []
  weight: Leaf  # float []; sum of the target weights
  language_nats: Leaf  # float [languages]; sums
  language_weight: Leaf  # float [languages]
  routing: RoutingStats | None  # stacked over MoE layers; None when dense
  gradient_norm: Leaf  # float []; before clipping, of what trains
  parameter_norm: Leaf  # float []; after the update
  update_norm: Leaf  # float []; of the change, learning rate included
  learning_rate: Leaf  # float []
  finite: Leaf  # bool []; loss, gradients and new parameters
  growth_mask: Leaf | None = None  # float []; None without a mask


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
  config: TrainConfig,
  *,
  model: ModelConfig,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  masks: Any,
  num_languages: int,
) -> TrainStep:
  """The step as a pure function; `jit_train_step` compiles it.

  Args:
    config: of the stage; accumulation, loss terms, EMA, growth mask.
    model: the architecture; of a growth mask, with its value at step 0.
    optimizer: of `make_optimizer`.
    schedule: of `learning_rate`.
    masks: of `trainable_masks`.
    num_languages: above every language index of a batch.

  Returns:
    The step.
  """
  decoder = DecoderLM(model)
  ema_decay = config.optimizer.ema_decay
  mask = mask_schedule(config, model.growth_mask)

  def train_step(state, batch):
    mask_value = None if mask is None else mask.traced(state.step)
    totals = losses.batch_totals(batch)

    def loss_fn(params, part):
      out: Any = decoder.apply(
        {"params": params},
        part.tokens,
        positions=part.positions,
        segments=part.segments,
        mask_value=mask_value,
      )
      terms = losses.loss_terms(
        out.logits,
        out.routing,
        batch=part,
        totals=totals,
        config=config.loss,
        num_languages=num_languages,
      )
      return terms.total, terms

    grads, terms = _accumulate(
      jax.grad(loss_fn, has_aux=True),
      state.params,
      batch=batch,
      num_microbatches=config.num_microbatches,
    )
    # Frozen elements have no gradient, so clipping does not count them either.
    nothing = jax.tree.map(jnp.zeros_like, grads)
    grads = select(masks, grads, otherwise=nothing)
    old = widen(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    rate = schedule(state.step)
    new = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, old, updates)
    new = select(masks, new, otherwise=old)
    change = jax.tree.map(jnp.subtract, new, old)
    params = jax.tree.map(lambda n, p: n.astype(p.dtype), new, state.params)
    ema = state.ema
    if ema_decay is not None:
      rest = 1 - ema_decay
      ema = jax.tree.map(lambda e, n: e + rest * (n - e), ema, new)
      ema = select(masks, ema, otherwise=state.ema)
    metrics = _metrics(
      terms,
      grads=grads,
      params=new,
      change=change,
      rate=rate,
      mask_value=mask_value,
    )
    return TrainState(
      step=state.step + 1, params=params, opt_state=opt_state, ema=ema
    ), metrics

  return train_step


def _accumulate(
  grad_fn: Callable[[Params, Batch], tuple[Params, losses.LossTerms]],
  params: Params,
  *,
  batch: Batch,
  num_microbatches: int,
) -> tuple[Params, losses.LossTerms]:
  """Gradients and loss terms summed over the microbatches, in float32."""

  def wide_grads(part):
    grads, terms = grad_fn(params, part)
    return widen(grads), terms

  if num_microbatches == 1:
    return wide_grads(batch)

  def split(leaf):
    # Row i goes to microbatch i mod n, so that a batch that is sharded over
    # its rows is cut without moving any between devices.
    # (B, T) -> (B/n, n, T) -> (n, B/n, T)
    rows = leaf.reshape(-1, num_microbatches, *leaf.shape[1:])
    return jnp.swapaxes(rows, 0, 1)

  def add(sums, part):
    return jax.tree.map(jnp.add, sums, wide_grads(part)), None

  parts = jax.tree.map(split, batch)
  shapes = jax.eval_shape(wide_grads, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add, zeros, parts)
  return sums


def _metrics(
  terms: losses.LossTerms,
  *,
  grads: Params,
  params: Params,
  change: Params,
  rate: jax.Array,
  mask_value: jax.Array | None = None,
) -> StepMetrics:
  gradient_norm = optax.tree.norm(grads)
  parameter_norm = optax.tree.norm(params)
  finite = [
    jnp.isfinite(x) for x in (terms.total, gradient_norm, parameter_norm)
  ]
  return StepMetrics(
    total_loss=terms.total,
    loss=terms.cross_entropy,
    lm_z=terms.lm_z,
    lm_max_z=terms.lm_max_z,
    weight=terms.weight,
    language_nats=terms.language_nats,
    language_weight=terms.language_weight,
    routing=terms.routing,
    gradient_norm=gradient_norm,
    parameter_norm=parameter_norm,
    update_norm=optax.tree.norm(change),
    learning_rate=rate,
    finite=finite[0] & finite[1] & finite[2],
    growth_mask=mask_value,
  )


def abstract_batch(config: TrainConfig, *, mesh: Mesh) -> Batch:
  """Shapes, dtypes and shardings of the batches that the step takes."""
  shape = (config.batch_size, config.sequence_length)
  sharding = batch_sharding(mesh)

  def leaf(dtype) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  return Batch(
    tokens=leaf(jnp.int32),
    targets=leaf(jnp.int32),
    weights=leaf(jnp.float32),
    segments=leaf(jnp.int32),
    positions=leaf(jnp.int32),
    languages=leaf(jnp.int32),
  )


def jit_train_step(
  train_step: TrainStep, *, state: TrainState, batch: Batch, mesh: Mesh
) -> Any:
  """The step jitted and donated: the new state takes the old one's memory.

  Args:
    train_step: of `make_train_step`.
    state: of `abstract_state`.
    batch: of `abstract_batch`.
    mesh: of the devices.

  Returns:
    A `jax.jit` function; the state it is given is consumed.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, batch)),
    # Metrics are small and replicated.
    out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
  )
