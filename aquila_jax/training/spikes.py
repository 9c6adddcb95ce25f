"""Steps that get out of hand: which they are, and what becomes of them.

A step is a spike where its loss, or its gradient's norm before clipping, lies
more than `sigmas` standard deviations above the mean of the last `window`
steps, once there have been half as many. Skipping such steps is the rule of
OLMo-core's SkipStepOptimizer, with its 6 deviations and 128 steps; of a number
that is not finite we keep no memory, which there made all later steps be
skipped. Going back to a checkpoint and past the batches that led there is what
PaLM did by hand (arXiv 2204.02311, section 5.1).

Spikes are judged on the device, from numbers that a checkpoint keeps, so that a
run that was stopped judges as one that was not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from aquila_jax.core.experiment_config import SpikeConfig
from aquila_jax.core.types import Leaf, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """A step out of hand, on the host."""

  step: int
  loss: float
  gradient_norm: float
  is_finite: bool
  is_spike: bool
  is_skipped: bool  # it changed nothing

  def wants_rewind(self, config: SpikeConfig) -> bool:
    """Whether the run goes back to before it."""
    return (not self.is_finite and config.nonfinite == "rewind") or (
      self.is_spike and config.spike == "rewind"
    )

  def stops(self, config: SpikeConfig) -> bool:
    """Whether the run ends with it."""
    return not self.is_finite and config.nonfinite == "stop"

  def in_words(self) -> str:
    """As in `step 7: spike, loss 9.2, gradient norm 31`."""
    what = "spike" if self.is_finite else "not finite"
    return (
      f"step {self.step}: {what}, loss {self.loss:.4g}, gradient norm"
      f" {self.gradient_norm:.4g}"
    )


class Judgement(struct.PyTreeNode):
  """Of one step, on the device."""

  spike: Leaf  # bool []
  skip: Leaf  # bool []
  recent: Leaf | None  # float [2 W]; with this step


def no_steps(config: SpikeConfig) -> Float[np.ndarray, "2 W"] | None:
  """What is known at step 0, or None where spikes are ignored.

  Loss and gradient norm of W steps, the latest last; NaN is of none.
  """
  if config.spike == "ignore":
    return None
  return np.full((2, config.window), np.nan, np.float32)


def judge(
  recent: Float[Array, "2 W"] | None,
  *,
  loss: Float[Array, ""],
  gradient_norm: Float[Array, ""],
  finite: Bool[Array, ""],
  config: SpikeConfig,
) -> Judgement:
  """Whether a step is a spike, and changes nothing.

  Args:
    recent: of the steps before.
    loss: of the step.
    gradient_norm: before clipping.
    finite: whether loss, gradients and new parameters are.
    config: of the stage.

  Returns:
    The judgement. Numbers that are not finite are not among the recent ones.
  """
  spike = jnp.zeros((), bool)
  if recent is not None:
    numbers = jnp.stack([loss, gradient_norm]).astype(recent.dtype)
    spike = finite & jnp.any(_is_far(recent, numbers, sigmas=config.sigmas))
    shifted = jnp.concatenate([recent[:, 1:], numbers[:, None]], axis=1)
    recent = jnp.where(finite, shifted, recent)
  skip = jnp.zeros((), bool)
  if config.nonfinite == "skip":
    skip |= ~finite
  if config.spike == "skip":
    skip |= spike
  return Judgement(spike=spike, skip=skip, recent=recent)


def _is_far(
  recent: Float[Array, "2 W"], numbers: Float[Array, "2"], *, sigmas: float
) -> Bool[Array, "2"]:
  known = jnp.isfinite(recent)
  count = jnp.sum(known, axis=1)
  total = jnp.maximum(count, 2).astype(recent.dtype)
  mean = jnp.sum(jnp.where(known, recent, 0.0), axis=1) / total
  square = jnp.square(jnp.where(known, recent - mean[:, None], 0.0))
  deviation = jnp.sqrt(jnp.sum(square, axis=1) / (total - 1))
  enough = count >= max(2, recent.shape[1] // 2)
  return enough & (numbers > mean + sigmas * deviation)


def kept(
  judgement: Judgement, *, old: TrainState, new: TrainState
) -> TrainState:
  """The new state; of a step that is skipped, its number alone is new."""

  def choose(before: Any, after: Any) -> Any:
    return jax.tree.map(
      lambda b, a: jnp.where(judgement.skip, b, a), before, after
    )

  return new.replace(
    params=choose(old.params, new.params),
    opt_state=choose(old.opt_state, new.opt_state),
    ema=choose(old.ema, new.ema),
    balance_weights=choose(old.balance_weights, new.balance_weights),
    recent=judgement.recent,
  )
