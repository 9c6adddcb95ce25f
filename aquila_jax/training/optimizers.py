"""AdamW from the declared axes, and the learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.experiment_config import OptimizerConfig
from aquila_jax.core.lineage import Copies
from aquila_jax.core.moments import get_moments

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def is_matrix(leaf: LeafAxes) -> bool:
  """Whether a leaf maps one space to another, and so is decayed.

  It reads at least one axis and writes at least one, or it is a table indexed
  by `vocab`. Norm scales and biases only write (in front of a tied LM head:
  only read), so they are vectors, stacked over layers or not.
  """
  return leaf.is_map or leaf.has("vocab")


def make_optimizer(
  config: OptimizerConfig,
  axes: Any,
  *,
  copies: Copies | None = None,
  path: str = "config.optimizer",
) -> optax.GradientTransformation:
  """AdamW without its learning rate: clip, Adam, decoupled decay.

  For gradients g with global norm |g|, a step counted from 1 by the state:

    g' = g * min(1, clip_norm / |g|)
    mu = beta1 mu + (1 - beta1) g',  nu = beta2 nu + (1 - beta2) g'^2
    u = (mu / (1 - beta1^count)) / (sqrt(nu / (1 - beta2^count)) + epsilon)
    update = u + weight_decay * parameter  (decayed leaves only)

  A selection bias has no gradient and no decay: its update is 0.

  (Loshchilov and Hutter, arXiv 1711.05101.) The step subtracts the learning
  rate times this. The learning rate stays outside since it counts the steps of
  a stage, while `count` goes on through growth.

  growth_lr="function_space" puts another u for a model that was grown. With
  C_read, C_write the products of the `copies` along the axes that the leaf
  reads, or writes:

    u = (mu / (1 - beta1^count))
        / (sqrt(nu / (1 - beta2^count)) + epsilon / C_write) / C_read

  Then a step of the grown model is the growth of a step of its source. For a
  growth that keeps the function makes each parameter a copy of the source's
  divided by C_read; gradient, mu and sqrt(nu) are copies divided by C_write
  (growth/optimizer_state.py). So C_write falls out of the first quotient, which
  is a copy of the source's, and 1 / C_read makes the step of the parameter the
  share that the parameter itself is; the decay is a share of it already. This
  is exact where the growth is (FPI, with copies that are equal), moments are
  grown or both start at zero, the batch is the same, and nothing is clipped
  (|g| grows with the model) or frozen. Elsewhere, as under AKI, it is a rule of
  thumb: copies together move as far as their source did.

  Args:
    config: of the stage.
    axes: the `LeafAxes` of every parameter; decides what is decayed.
    copies: of `Lineage.copies`; read under function_space only.
    path: the dotted name of `config`, for messages.

  Returns:
    A transformation whose state has exactly one `optax.ScaleByAdamState`.

  Raises:
    errors.UserError: under function_space, where nothing was grown.
  """
  decayed = jax.tree.map(
    lambda leaf: (
      (config.decay_vectors or is_matrix(leaf)) and not leaf.is_selection_bias
    ),
    axes,
  )
  adam = optax.scale_by_adam(
    b1=config.beta1, b2=config.beta2, eps=config.epsilon
  )
  if config.growth_lr == "function_space":
    if copies is None:
      raise errors.UserError(
        f"{path}.growth_lr='function_space': expected a model that was grown by"
        " copying; its lineage has no scale_up, or the last one has no copies"
        " (method='random', or an earlier version of this package)"
      )
    adam = _in_function_space(adam, config, axes, copies=copies)
  parts = [
    adam,
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


@dataclasses.dataclass(frozen=True)
class _LeafCopies:
  """C_read and C_write of a leaf, as vectors along its dimensions.

  They are not multiplied: two long axes of one role would make a constant as
  large as the leaf.
  """

  read: tuple[np.ndarray, ...]
  written: tuple[np.ndarray, ...]


def _in_function_space(
  adam: optax.GradientTransformation,
  config: OptimizerConfig,
  axes: Any,
  *,
  copies: Copies,
) -> optax.GradientTransformation:
  """Adam whose update is that of `make_optimizer` under function_space."""
  leaf_copies = jax.tree.map(lambda leaf: _leaf_copies(leaf, copies), axes)

  def update(updates, state, params=None):
    # Of Adam's own the moments are used; the compiler drops its quotient.
    _, state = adam.update(updates, state, params)
    moments = get_moments(state)
    mean, square = (
      optax.tree.bias_correction(moment, beta, moments.count)
      for moment, beta in (
        (moments.mu, config.beta1),
        (moments.nu, config.beta2),
      )
    )

    def quotient(c: _LeafCopies, mean, square):
      epsilon = jnp.asarray(config.epsilon, mean.dtype)
      root = jnp.sqrt(square) + _divided(epsilon, c.written)
      return _divided(mean / root, c.read)

    return jax.tree.map(quotient, leaf_copies, mean, square), state

  return optax.GradientTransformation(adam.init, update)


def _leaf_copies(leaf: LeafAxes, copies: Copies) -> _LeafCopies:
  rank = len(leaf.axes)

  def along(role: Role) -> tuple[np.ndarray, ...]:
    return tuple(
      copies[axis.name].reshape([-1 if d == dim else 1 for d in range(rank)])
      for dim, axis in enumerate(leaf.axes)
      if axis.role == role
      and axis.name in copies
      and (copies[axis.name] != 1).any()
    )

  return _LeafCopies(read=along(Role.READS), written=along(Role.WRITES))


def _divided(
  value: Float[Array, "..."], vectors: tuple[np.ndarray, ...]
) -> Float[Array, "..."]:
  for vector in vectors:
    value = value / jnp.asarray(vector, value.dtype)
  return value


def learning_rate(
  config: OptimizerConfig,
  total_steps: int,
  *,
  trained_steps: int | None = None,
  path: str = "config.optimizer",
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

  Where the weights were trained before, `continuation` changes the numbers:

    rewarm    nothing
    restart   W = 0: warmup_steps is of stages from scratch, and may be shared
              with them
    keep      s = trained_steps + step + 1, S = trained_steps + total_steps

  `keep` is the schedule of one long training, of which this stage is the last
  part. It joins what went before without a jump if that was on the same curve:
  the constant part of "constant" or "wsd", not a cosine that has come down.

  Args:
    config: the schedule and its numbers.
    total_steps: of the stage.
    trained_steps: of `Lineage.trained_steps`; None where the weights are as
      they were drawn, and then `continuation` changes nothing.
    path: the dotted name of `config`, for messages.

  Returns:
    A function of the stage's step, counted from 0.

  Raises:
    errors.UserError: where the warm-up is longer than the schedule.
  """
  before = 0
  if config.continuation == "keep" and trained_steps:
    before = trained_steps
    total_steps += before
  if config.continuation == "restart" and trained_steps is not None:
    config = dataclasses.replace(config, warmup_steps=0)
  warmup = config.warmup_steps
  if warmup > total_steps:
    with_earlier = f" and the {before} before it" if before else ""
    raise errors.UserError(
      f"{path}.warmup_steps={warmup}: expected at most the steps of the stage"
      f"{with_earlier}, {total_steps}"
    )
  decay = _DECAYS[config.schedule](config, total_steps)

  def rate(step):
    update = step.astype(jnp.float32) + (before + 1)
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
