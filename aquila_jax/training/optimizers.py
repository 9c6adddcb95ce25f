"""AdamW from the declared axes, and the learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.experiment_config import OptimizerConfig

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def is_matrix(leaf: LeafAxes) -> bool:
  """Whether a leaf maps one space to another, and so is decayed.

  It reads at least one axis and writes at least one, or it is a table indexed
  by `vocab`. Norm scales and biases only write (in front of a tied LM head:
  only read), so they are vectors, stacked over layers or not.
  """
  roles = {axis.role for axis in leaf.axes}
  return {Role.READS, Role.WRITES} <= roles or leaf.has("vocab")


def make_optimizer(
  config: OptimizerConfig, axes: Any
) -> optax.GradientTransformation:
  """AdamW without its learning rate: clip, Adam, decoupled decay.

  For gradients g with global norm |g|, a step counted from 1 by the state:

    g' = g * min(1, clip_norm / |g|)
    mu = beta1 mu + (1 - beta1) g',  nu = beta2 nu + (1 - beta2) g'^2
    u = (mu / (1 - beta1^count)) / (sqrt(nu / (1 - beta2^count)) + epsilon)
    update = u + weight_decay * parameter  (decayed leaves only)

  (Loshchilov and Hutter, arXiv 1711.05101.) The step subtracts the learning
  rate times this. The learning rate stays outside since it counts the steps of
  a stage, while `count` goes on through growth.

  Args:
    config: of the stage.
    axes: the `LeafAxes` of every parameter; decides what is decayed.

  Returns:
    A transformation whose state has exactly one `optax.ScaleByAdamState`.
  """
  decayed = jax.tree.map(
    lambda leaf: config.decay_vectors or is_matrix(leaf), axes
  )
  parts = [
    optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    optax.add_decayed_weights(config.weight_decay, mask=decayed),
  ]
  if config.clip_norm is not None:
    parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
  chain = optax.chain(*parts)

  def update(updates, state, params=None):
    # Optax raises a Python float to the power of an int32 count, which strict
    # promotion refuses; the result is float32 either way.
    with jax.numpy_dtype_promotion("standard"):
      return chain.update(updates, state, params)

  return optax.GradientTransformation(chain.init, update)


def learning_rate(
  config: OptimizerConfig, total_steps: int, *, path: str = "config.optimizer"
) -> Schedule:
  """The learning rate of every step of a stage.

  With s = step + 1 (the first update is s = 1), S = total_steps,
  W = warmup_steps, and p, r the peak and the final ratio:

    warm-up   s <= W:  p s / W
    constant  p
    cosine    p (r + (1 - r) (1 + cos(pi (s - W) / (S - W))) / 2)
    wsd       p (1 - (1 - r) max(0, s - (S - D)) / D),
              D = min(round(decay_share S), S - W)

  So the last update (s = S) has r p under cosine and wsd.

  Args:
    config: the schedule and its numbers.
    total_steps: S.
    path: the dotted name of `config`, for messages.

  Returns:
    A function of the stage's step, counted from 0.

  Raises:
    errors.UserError: where the warm-up is longer than the stage.
  """
  warmup = config.warmup_steps
  if warmup > total_steps:
    raise errors.UserError(
      f"{path}.warmup_steps={warmup}: expected at most the steps of the stage,"
      f" {total_steps}"
    )
  decay = _DECAYS[config.schedule](config, total_steps)

  def rate(step):
    update = step.astype(jnp.float32) + 1
    warm = jnp.minimum(1.0, update / max(warmup, 1))
    return config.learning_rate * jnp.where(
      update <= warmup, warm, decay(update)
    )

  return rate


def _constant(config: OptimizerConfig, total_steps: int):
  del config, total_steps
  return jnp.ones_like


def _cosine(config: OptimizerConfig, total_steps: int):
  warmup, final = config.warmup_steps, config.final_ratio
  length = max(total_steps - warmup, 1)

  def decay(update):
    progress = (update - warmup) / length
    return final + (1 - final) * (1 + jnp.cos(jnp.pi * progress)) / 2

  return decay


def _wsd(config: OptimizerConfig, total_steps: int):
  length = min(
    round(config.decay_share * total_steps), total_steps - config.warmup_steps
  )
  start = total_steps - length

  def decay(update):
    progress = jnp.maximum(0.0, update - start) / max(length, 1)
    return 1 - (1 - config.final_ratio) * progress

  return decay


_DECAYS = {"constant": _constant, "cosine": _cosine, "wsd": _wsd}
