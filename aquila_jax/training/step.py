"""The pure training step: loss and gradient, update, metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Leaf, Params, RoutingStats, TrainState
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import batch_sharding, on_mesh
from aquila_jax.training import balance, losses, spikes
from aquila_jax.training.accumulation import LossGradient
from aquila_jax.training.compilation import overlap_options
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
  balance: Leaf | None = None  # float [L]; the balance loss; None when dense
  # float [L]; its weights in this step, where they adapt.
  balance_weights: Leaf | None = None
  spike: Leaf | None = None  # bool []; None where nobody asks
  skipped: Leaf | None = None  # bool []; None where nothing is


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
  config: TrainConfig,
  *,
  model: ModelConfig,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  masks: Any,
  num_languages: int,
  seed: int = 0,
) -> TrainStep:
  """The step as a pure function; `jit_train_step` compiles it.

  Args:
    config: of the stage; accumulation, loss terms, EMA, growth mask.
    model: the architecture; of a growth mask, with its value at step 0.
    optimizer: of `make_optimizer`.
    schedule: of `learning_rate`.
    masks: of `trainable_masks`.
    num_languages: above every language index of a batch.
    seed: of the routers' noise.

  Returns:
    The step.
  """
  loss_gradient = LossGradient(
    config=config, model=model, num_languages=num_languages, seed=seed
  )
  move_bias = _bias_mover(config, model)
  move_weights = _weight_mover(config, model)
  ema_decay = config.optimizer.ema_decay
  mask = mask_schedule(config, model.growth_mask)

  def train_step(state, batch):
    mask_value = None if mask is None else mask.traced(state.step)
    grads, terms = loss_gradient(
      state.params,
      batch,
      step=state.step,
      mask_value=mask_value,
      balance_weights=state.balance_weights,
    )
    # Frozen elements have no gradient, so clipping does not count them either.
    nothing = jax.tree.map(jnp.zeros_like, grads)
    grads = select(masks, grads, otherwise=nothing)
    old = widen(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, old)
    rate = schedule(state.step)
    new = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, old, updates)
    new = select(masks, move_bias(new, terms.routing), otherwise=old)
    change = jax.tree.map(jnp.subtract, new, old)
    params = jax.tree.map(lambda n, p: n.astype(p.dtype), new, state.params)
    ema = state.ema
    if ema_decay is not None:
      rest = 1 - ema_decay
      ema = jax.tree.map(lambda e, n: e + rest * (n - e), ema, new)
      ema = select(masks, ema, otherwise=state.ema)
    metrics = _metrics(
      terms, grads=grads, params=new, change=change, rate=rate
    ).replace(growth_mask=mask_value, balance_weights=state.balance_weights)
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema=ema,
      balance_weights=move_weights(state.balance_weights, terms.routing),
      recent=state.recent,
    )
    return _guarded(new_state, metrics, old=state, config=config)

  return train_step


def _guarded(
  new: TrainState,
  metrics: StepMetrics,
  *,
  old: TrainState,
  config: TrainConfig,
) -> tuple[TrainState, StepMetrics]:
  """What the config's policy for steps out of hand makes of one."""
  if old.recent is None and not config.spikes.can_skip:
    return new, metrics
  judgement = spikes.judge(
    old.recent,
    loss=metrics.total_loss,
    gradient_norm=metrics.gradient_norm,
    finite=metrics.finite,
    config=config.spikes,
  )
  metrics = metrics.replace(spike=judgement.spike, skipped=judgement.skip)
  if not config.spikes.can_skip:
    return new.replace(recent=judgement.recent), metrics
  return spikes.kept(judgement, old=old, new=new), metrics


def _bias_mover(
  config: TrainConfig, model: ModelConfig
) -> Callable[[Params, Any], Params]:
  """Moves the selection biases of a model that has them."""
  if not balance.has_selection_bias(model):
    return lambda params, routing: params
  axes = decoder_lm.parameter_axes(model)

  def move(params, routing):
    return balance.move_selection_bias(
      params, axes=axes, load=routing.load, rate=config.loss.bias_rate
    )

  return move


def _weight_mover(
  config: TrainConfig, model: ModelConfig
) -> Callable[[Any, Any], Any]:
  """Moves the weights of the balance loss, where they adapt."""
  adaptive = config.loss.adaptive_balance
  if adaptive is None or model.moe is None:
    return lambda weights, routing: weights
  return functools.partial(balance.next_weights, config=adaptive, model=model)


def _metrics(
  terms: losses.LossTerms,
  *,
  grads: Params,
  params: Params,
  change: Params,
  rate: jax.Array,
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
    balance=terms.balance,
  )


def abstract_batch(config: TrainConfig, *, mesh: Mesh | AbstractMesh) -> Batch:
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
  train_step: TrainStep,
  *,
  state: TrainState,
  batch: Batch,
  mesh: Mesh | AbstractMesh,
  overlap: bool = True,
) -> Any:
  """The step jitted and donated: the new state takes the old one's memory.

  Args:
    train_step: of `make_train_step`.
    state: of `abstract_state`.
    batch: of `abstract_batch`.
    mesh: of the devices.
    overlap: as TrainConfig.overlap_collectives.

  Returns:
    A `jax.jit` function; the state it is given is consumed.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

  return jax.jit(
    on_mesh(train_step, mesh),
    donate_argnums=0,
    in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, batch)),
    # Metrics are small and replicated.
    out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    compiler_options=overlap_options() if overlap and mesh.size > 1 else None,
  )
