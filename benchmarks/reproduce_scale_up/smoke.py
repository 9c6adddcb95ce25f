"""The same experiment in miniature, on text of the repository."""

from __future__ import annotations

import dataclasses

from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  LigoConfig,
  ScaleUp,
  StageConfig,
)
from benchmarks.reproduction import smoke


def shrunk(experiment: ExperimentConfig) -> ExperimentConfig:
  """Widths by a quarter and a few steps; depths and heads stay."""
  return smoke.shrunk(experiment, steps=lambda _: 8, change=_with_short_ligo)


def _with_short_ligo(stage: StageConfig) -> StageConfig:
  init = stage.init
  if not isinstance(init, ScaleUp):
    return stage
  init = dataclasses.replace(init, ligo=LigoConfig(steps=2))
  return dataclasses.replace(stage, init=init)
