"""The same experiment in miniature, on text of the repository."""

from __future__ import annotations

import dataclasses

from aquila_jax.cli import config_door
from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  LigoConfig,
  ScaleUp,
  StageConfig,
)

_TEXT = "experiments/configs/smoke.py"
_FACTOR = 4  # widths, that of a head too, are so many times smaller
_LENGTH = 32


def shrunk(experiment: ExperimentConfig) -> ExperimentConfig:
  """Widths by a quarter and a few steps; depths and heads stay."""
  small = config_door.load_file(_TEXT)
  vocab_size = small.data.tokenizer.vocab_size
  return dataclasses.replace(
    experiment,
    data=small.data,
    evaluation=dataclasses.replace(small.evaluation, prompts=()),
    stages={
      name: _shrunk(stage, vocab_size)
      for name, stage in experiment.stages.items()
    },
  )


def _shrunk(stage: StageConfig, vocab_size: int) -> StageConfig:
  model, train, init = stage.model, stage.train, stage.init
  if isinstance(init, ScaleUp):
    init = dataclasses.replace(init, ligo=LigoConfig(steps=2))
  return dataclasses.replace(
    stage,
    init=init,
    model=dataclasses.replace(
      model,
      vocab_size=vocab_size,
      embed_dim=model.embed_dim // _FACTOR,
      mlp_dim=model.mlp_dim // _FACTOR,
      head_dim=4,
      context_length=_LENGTH,
    ),
    train=dataclasses.replace(
      train,
      steps=8,
      sequence_length=_LENGTH,
      batch_size=8,
      optimizer=dataclasses.replace(train.optimizer, warmup_steps=2),
      log_every=4,
      evaluate_every=4,
      evaluate_tokens=512,
    ),
  )
