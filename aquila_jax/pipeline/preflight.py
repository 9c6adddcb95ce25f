"""Everything that can be refused before the first step of the first stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh
from tokenizers import Tokenizer

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  Load,
  ScaleOut,
  ScaleUp,
  StageConfig,
)
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel, read_header
from aquila_jax.generation.generate import encode_prompts
from aquila_jax.growth import scale_out, scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import budget, initial
from aquila_jax.pipeline.context import Context
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import inputs, step
from aquila_jax.training.freezing import NewIndices, trainable_masks
from aquila_jax.training.growth_mask import mask_schedule, trained
from aquila_jax.training.optimizers import learning_rate


def check_config(
  experiment: ExperimentConfig, *, stages: Sequence[str]
) -> None:
  """Checks stages against each other and the devices, before there are data.

  Args:
    experiment: the whole config.
    stages: those that will run, in order.

  Raises:
    errors.UserError: on the first thing that would stop a stage later; it names
      the field.
  """
  mesh = make_mesh(experiment.mesh)
  for name in stages:
    _check_stage(experiment, name, mesh=mesh)


def check_order(experiment: ExperimentConfig) -> None:
  """Checks that every stage stands behind the one that it grows from.

  Raises:
    errors.UserError: naming the stage that does not.
  """
  for i, name in enumerate(experiment.pipeline):
    source = budget.source_of(experiment.stages[name])
    if source in experiment.stages and source not in experiment.pipeline[:i]:
      raise errors.UserError(
        f"config.stages.{name}.init.source={source!r}: expected a stage that"
        f" stands before it in pipeline={experiment.pipeline}"
      )


def check_data(context: Context, *, stages: Sequence[str]) -> None:
  """Checks stages against the data: vocabulary, prompts, tokenizers.

  Args:
    context: config and data.
    stages: those that will run.

  Raises:
    errors.UserError: as `check_config`.
  """
  experiment = context.experiment
  tokenizer = Tokenizer.from_str(context.data.tokenizer_text)
  for name in stages:
    stage = experiment.stages[name]
    path = f"config.stages.{name}.model"
    initial.check_vocabulary(stage.model, context, path=path)
    source = budget.source_of(stage)
    if source and source not in experiment.stages:
      field = initial.source_field(stage, name)
      initial.check_tokenizer(context, source, what=field)
    encode_prompts(
      experiment.evaluation.prompts,
      tokenizer=tokenizer,
      context_length=stage.model.context_length,
    )


def _check_stage(
  experiment: ExperimentConfig, name: str, *, mesh: Mesh
) -> None:
  """Checks one stage: its start, mesh, schedule and what is frozen."""
  stage, path = experiment.stages[name], f"config.stages.{name}"
  new_indices = _check_start(experiment, name)
  mask_schedule(
    stage.train,
    _starting_model(experiment, name).growth_mask,
    path=f"{path}.train",
  )
  axes = decoder_lm.parameter_axes(stage.model)
  shapes = decoder_lm.abstract_params(stage.model)
  param_shardings(axes, shapes, mesh)
  inputs.check_batch_divides(
    stage.train,
    like=step.abstract_batch(stage.train, mesh=mesh),
    path=f"{path}.train",
  )
  learning_rate(
    stage.train.optimizer,
    budget.total_steps(experiment, name),
    path=f"{path}.train.optimizer",
  )
  trainable_masks(
    stage.train.freeze,
    axes=axes,
    shapes=shapes,
    new_indices=new_indices,
    path=f"{path}.train.freeze",
  )


def _check_start(experiment: ExperimentConfig, name: str) -> NewIndices | None:
  """Checks a stage against its source; what its growth will add."""
  stage = experiment.stages[name]
  source = budget.source_of(stage)
  if not source:
    return None
  init, path = stage.init, f"config.stages.{name}.model"
  field = initial.source_field(stage, name)
  if source in experiment.stages:
    # It may not be trained yet.
    config, lineage = _trained_model(experiment, source), Lineage()
  else:
    header = read_header(source, what=field)
    config, lineage = header.config, header.lineage
  if isinstance(init, ScaleOut):
    scale_out.check_pair(config, stage.model, path=path)
    return _inherited(experiment, source, lineage)
  if isinstance(init, ScaleUp):
    for method in init.compare:
      if method != init.method:
        options = initial.with_method(init, method)
        scale_up.check_pair(config, stage.model, options, path=path)
    return scale_up.new_indices(config, stage.model, init, path=path)
  initial.check_same_architecture(config, stage.model, path=path)
  return lineage.new_indices


def _trained_model(experiment: ExperimentConfig, name: str) -> ModelConfig:
  """The architecture of the MODEL that a stage will leave."""
  return trained(
    _starting_model(experiment, name),
    experiment.stages[name].train,
    steps=budget.total_steps(experiment, name),
    path=f"config.stages.{name}.train",
  )


def _starting_model(experiment: ExperimentConfig, name: str) -> ModelConfig:
  """The architecture of a stage under the growth mask that it will start with.

  A growth may put one on, a MODEL that is loaded keeps what it has.
  """
  stage = experiment.stages[name]
  source = budget.source_of(stage)
  if not isinstance(stage.init, Load | ScaleUp):
    return stage.model
  if source in experiment.stages:
    config = _trained_model(experiment, source)
  else:
    field = initial.source_field(stage, name)
    config = read_header(source, what=field).config
  if isinstance(stage.init, Load):
    return dataclasses.replace(stage.model, growth_mask=config.growth_mask)
  header = StoredModel(
    config=config, lineage=Lineage(), params={}, tokenizer=None
  )
  return scale_up.grown_header(
    header,
    stage.model,
    stage.init,
    seed=0,
    name=name,
    path=f"config.stages.{name}.model",
  ).config


def _inherited(
  experiment: ExperimentConfig, source: str, lineage: Lineage
) -> NewIndices | None:
  """What the last Scale-Up among the ancestors added."""
  stage: StageConfig | None = experiment.stages.get(source)
  while stage is not None:
    before = budget.source_of(stage)
    parent = experiment.stages.get(before)
    if isinstance(stage.init, ScaleUp) and parent is not None:
      return scale_up.new_indices(parent.model, stage.model, stage.init)
    stage = parent
  return lineage.new_indices
