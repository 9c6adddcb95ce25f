"""How long a stage trains: steps as given, or as many FLOPs as another took."""

from __future__ import annotations

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  Load,
  ScaleOut,
  ScaleUp,
  StageConfig,
)
from aquila_jax.core.model_dir import read_header
from aquila_jax.pipeline.learned_growth import operator_training, planned_flops
from aquila_jax.planning import counting


def token_flops(stage: StageConfig) -> float:
  """Training FLOPs of one token of a stage: all that a step computes for it."""
  train = stage.train
  return counting.train_flops_per_token(
    stage.model,
    train.sequence_length,
    has_load_pass=train.has_load_pass(stage.model),
  )


def step_flops(stage: StageConfig) -> float:
  """Training FLOPs of one step of a stage."""
  return stage.train.tokens_per_step * token_flops(stage)


def total_steps(experiment: ExperimentConfig, name: str) -> int:
  """The steps of a stage: its own, or what `match_flops` comes to.

  Args:
    experiment: with the stage, and the one whose FLOPs it matches.
    name: of the stage.

  Returns:
    The number of steps whose FLOPs come nearest.

  Raises:
    errors.UserError: where one step takes more than all FLOPs to match.
  """
  stage = experiment.stages[name]
  matched = stage.train.match_flops
  if not matched:
    return stage.train.steps
  budget = _flops_with_ancestors(experiment, matched)
  steps = round(budget / step_flops(stage))
  if steps < 1:
    raise errors.UserError(
      f"config.stages.{name}.train.match_flops={matched!r}: one step takes"
      f" {step_flops(stage):.3g} FLOPs, the stage and its ancestors took"
      f" {budget:.3g}; expected a smaller batch"
    )
  return steps


def parent_stage(experiment: ExperimentConfig, name: str) -> str:
  """The stage of this experiment that a stage grows from; "" where none."""
  source = source_of(experiment.stages[name])
  return source if source in experiment.stages else ""


def source_of(stage: StageConfig) -> str:
  """What a stage starts from: a stage, the path of a MODEL, or ""."""
  init = stage.init
  if isinstance(init, Load):
    return init.path
  return init.source if isinstance(init, ScaleUp | ScaleOut) else ""


def _flops_with_ancestors(experiment: ExperimentConfig, name: str) -> float:
  """Of a stage and all that it comes from, each counted once."""
  stages, models = _ancestors(experiment, name)
  total = sum(
    total_steps(experiment, stage) * step_flops(experiment.stages[stage])
    + _learning_flops(experiment, stage)
    for stage in stages
  )
  for path, what in models.items():
    total += read_header(path, what=what).lineage.flops
  return total


def _ancestors(
  experiment: ExperimentConfig, name: str
) -> tuple[list[str], dict[str, str]]:
  """The stages that lead to one, itself among them, and the MODELs.

  Returns:
    Names, and for each path the field that has it.
  """
  stages, models = [name], dict[str, str]()
  for current in stages:  # grows meanwhile
    init = experiment.stages[current].init
    sources = [source_of(experiment.stages[current])]
    sources += init.sources if isinstance(init, ScaleOut) else ()
    for source in filter(None, sources):
      if source not in experiment.stages:
        models.setdefault(source, f"config.stages.{current}.init")
      elif source not in stages:
        stages.append(source)
  return stages, models


def _learning_flops(experiment: ExperimentConfig, name: str) -> float:
  """What a stage's growth takes, where it is learned."""
  stage = experiment.stages[name]
  if not isinstance(stage.init, ScaleUp) or stage.init.method != "ligo":
    return 0.0
  source = stage.init.source
  if source in experiment.stages:
    config = experiment.stages[source].model
  else:
    what = f"config.stages.{name}.init.source"
    config = read_header(source, what=what).config
  train = operator_training(stage.init.ligo, stage.train)
  return planned_flops(config, stage.model, train)
