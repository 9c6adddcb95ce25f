"""The same experiment in miniature, on text of the repository."""

from __future__ import annotations

import dataclasses

from aquila_jax.core.experiment_config import ExperimentConfig, StageConfig
from benchmarks.reproduction import smoke

_FEWER = 75  # so many times fewer steps
_BLOCK = 8  # rows; a batch has 256 tokens, and 64 would be mostly padding


def shrunk(experiment: ExperimentConfig) -> ExperimentConfig:
  """Widths by a quarter and a few steps; depths, heads and experts stay."""
  return smoke.shrunk(
    experiment, steps=lambda steps: round(steps / _FEWER), change=_changed
  )


def _changed(stage: StageConfig) -> StageConfig:
  moe = stage.model.moe
  if moe is None:
    return stage
  moe = dataclasses.replace(moe, block_size=_BLOCK)
  return dataclasses.replace(
    stage, model=dataclasses.replace(stage.model, moe=moe)
  )
