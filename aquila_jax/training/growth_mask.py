"""When the new parts of a grown model count in full: Masked Structural Growth.

The model says what is new and how much it counts at the start (GrowthMask);
`TrainConfig.mask_steps` says how fast that rises to 1.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.model_config import GrowthMask, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSchedule:
  """The mask's value m(s) = min(1, start + s / steps) after s updates.

  Update s + 1 is made under m(s), so the first is under `start`. A stage that
  ends before m is 1 leaves a model with a mask, and the next goes on from it.
  """

  start: float
  steps: int  # from 0 to 1

  @property
  def last(self) -> int:
    """The first s with m(s) = 1; what a rounding is short of 1 is 1."""
    return math.ceil((1 - self.start) * self.steps - 1e-6)

  def at(self, step: int) -> float:
    """The value, of a number on the host."""
    return 1.0 if step >= self.last else self.start + step / self.steps

  def traced(self, step: Int[Array, ""]) -> Float[Array, ""]:
    """The value in float32, of a number on the device."""
    rising = self.start + step.astype(jnp.float32) / self.steps
    return jnp.where(step >= self.last, jnp.ones((), jnp.float32), rising)


def mask_schedule(
  config: TrainConfig, mask: GrowthMask | None, *, path: str = "config.train"
) -> MaskSchedule | None:
  """The schedule of a stage.

  Args:
    config: with `mask_steps`.
    mask: of the model that the stage starts from.
    path: the dotted name of `config`, for messages.

  Returns:
    The schedule; None for a model without a mask.

  Raises:
    errors.UserError: where `mask_steps` does not fit the model.
  """
  steps = config.mask_steps
  if mask is None:
    if steps:
      raise errors.UserError(
        f"{path}.mask_steps={steps}: expected 0; the model that the stage"
        " starts from has no growth_mask that could rise"
      )
    return None
  if not steps:
    raise errors.UserError(
      f"{path}.mask_steps=0: expected at least 1; the model that the stage"
      f" starts from has a growth_mask of value {mask.value:g}, which training"
      " raises to 1, by 1 in so many steps"
    )
  return MaskSchedule(start=mask.value, steps=steps)


def trained(
  model: ModelConfig, config: TrainConfig, *, steps: int, path: str
) -> ModelConfig:
  """What the architecture is after the training of a stage.

  Args:
    model: that the stage starts from.
    config: of the stage.
    steps: of the stage.
    path: the dotted name of `config`, for messages.

  Returns:
    The architecture, with its growth mask as high as it rose; without one where
    it reached 1.

  Raises:
    errors.UserError: as `mask_schedule`.
  """
  mask = model.growth_mask
  schedule = mask_schedule(config, mask, path=path)
  if mask is None or schedule is None:
    return model
  value = schedule.at(steps)
  mask = None if value == 1 else dataclasses.replace(mask, value=value)
  return dataclasses.replace(model, growth_mask=mask)
