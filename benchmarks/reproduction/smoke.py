"""An experiment in miniature, on text of the repository."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from aquila_jax.cli import config_door
from aquila_jax.core.experiment_config import ExperimentConfig, StageConfig
from aquila_jax.core.model_config import ModelConfig

_TEXT = "experiments/configs/smoke.py"
_FACTOR = 4  # widths, that of a head too, are so many times smaller
_LENGTH = 32

ChangeStage = Callable[[StageConfig], StageConfig]


def shrunk(
  experiment: ExperimentConfig,
  *,
  steps: Callable[[int], int],
  change: ChangeStage = lambda stage: stage,
) -> ExperimentConfig:
  """Widths by a quarter and a few steps; depths, heads and experts stay.

  Args:
    experiment: the whole one.
    steps: of a stage, from those that it has.
    change: what else becomes of a stage.

  Returns:
    The experiment in miniature.
  """
  small = config_door.load_file(_TEXT)
  vocab_size = small.data.tokenizer.vocab_size
  return dataclasses.replace(
    experiment,
    data=small.data,
    evaluation=dataclasses.replace(small.evaluation, prompts=()),
    stages={
      name: change(_shrunk(stage, vocab_size, steps))
      for name, stage in experiment.stages.items()
    },
  )


def _shrunk(
  stage: StageConfig, vocab_size: int, steps: Callable[[int], int]
) -> StageConfig:
  train = stage.train
  return dataclasses.replace(
    stage,
    model=_model(stage.model, vocab_size),
    train=dataclasses.replace(
      train,
      # 0 is as many as `match_flops` comes to.
      steps=steps(train.steps) if train.steps else 0,
      sequence_length=_LENGTH,
      batch_size=8,
      optimizer=dataclasses.replace(train.optimizer, warmup_steps=2),
      log_every=4,
      evaluate_every=4,
      evaluate_tokens=512,
    ),
  )


def _model(model: ModelConfig, vocab_size: int) -> ModelConfig:
  moe = model.moe
  if moe is not None:
    width = moe.shared_expert_dim // _FACTOR
    moe = dataclasses.replace(moe, shared_expert_dim=width)
  return dataclasses.replace(
    model,
    vocab_size=vocab_size,
    embed_dim=model.embed_dim // _FACTOR,
    mlp_dim=model.mlp_dim // _FACTOR,
    head_dim=4,
    context_length=_LENGTH,
    moe=moe,
  )
