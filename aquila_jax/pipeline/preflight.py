"""Everything that can be refused before the first step of the first stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh
from tokenizers import Tokenizer

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  ScaleOut,
  ScaleUp,
)
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel, read_header
from aquila_jax.generation.generate import encode_prompts
from aquila_jax.growth import scale_out, scale_up
from aquila_jax.growth.calibration import Calibration
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import budget, initial, records
from aquila_jax.pipeline.context import Context
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import inputs, step
from aquila_jax.training.freezing import trainable_masks
from aquila_jax.training.growth_mask import mask_schedule, trained
from aquila_jax.training.optimizers import learning_rate, make_optimizer


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
    init = experiment.stages[name].init
    named = {"source": budget.source_of(experiment.stages[name])}
    if isinstance(init, ScaleOut):
      named |= {f"sources[{i}]": given for i, given in enumerate(init.sources)}
    for field, source in named.items():
      if source in experiment.stages and source not in experiment.pipeline[:i]:
        raise errors.UserError(
          f"config.stages.{name}.init.{field}={source!r}: expected a stage that"
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
    if isinstance(stage.init, ScaleOut):
      for i, given in enumerate(stage.init.sources):
        if given not in experiment.stages:
          field = f"config.stages.{name}.init.sources[{i}]"
          initial.check_tokenizer(context, given, what=field)
    encode_prompts(
      experiment.evaluation.prompts,
      tokenizer=tokenizer,
      context_length=stage.model.context_length,
    )


def _check_stage(
  experiment: ExperimentConfig, name: str, *, mesh: Mesh
) -> None:
  """Checks one stage: its start, mesh, optimizer and what is frozen."""
  stage, path = experiment.stages[name], f"config.stages.{name}"
  start = _start(experiment, name)
  lineage = start.lineage
  mask_schedule(stage.train, start.config.growth_mask, path=f"{path}.train")
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
    trained_steps=lineage.trained_steps,
    path=f"{path}.train.optimizer",
  )
  make_optimizer(
    stage.train.optimizer,
    axes,
    copies=lineage.copies,
    path=f"{path}.train.optimizer",
  )
  trainable_masks(
    stage.train.freeze,
    axes=axes,
    shapes=shapes,
    new_indices=lineage.new_indices,
    path=f"{path}.train.freeze",
  )


def _start(experiment: ExperimentConfig, name: str) -> StoredModel:
  """Checks a stage against its source.

  Returns:
    The model that the stage will start with, without arrays and tokenizer: its
    lineage, and its architecture under the growth mask that it will have.
  """
  stage = experiment.stages[name]
  source = budget.source_of(stage)
  if not source:
    return _without_arrays(
      stage.model, Lineage(events=(Event(kind="scratch"),))
    )
  init, path = stage.init, f"config.stages.{name}.model"
  if source in experiment.stages:
    model = _end(experiment, source)  # it may not be trained yet
  else:
    header = read_header(source, what=initial.source_field(stage, name))
    model = _without_arrays(header.config, header.lineage)
  if isinstance(init, ScaleOut):
    plan = scale_out.plan_scale_out(model.config, stage.model, init, path=path)
    mixed = _others(experiment, name, init, like=model.config)
    return scale_out.grown_header(
      model,
      plan,
      init,
      calibration=Calibration(),
      seed=0,
      name=name,
      mixed=[other.lineage for other in mixed],
    )
  if isinstance(init, ScaleUp):
    for method in init.compare:
      if method != init.method:
        options = initial.with_method(init, method)
        scale_up.plan_growth(model.config, stage.model, options, path=path)
    # Another seed draws other maps; what can be refused is the same.
    return scale_up.grown_header(
      model, stage.model, init, seed=0, name=name, path=path
    )
  initial.check_same_architecture(model.config, stage.model, path=path)
  # A growth may put a mask on; a MODEL that is loaded keeps what it has.
  masked = dataclasses.replace(
    stage.model, growth_mask=model.config.growth_mask
  )
  return dataclasses.replace(model, config=masked)


def _others(
  experiment: ExperimentConfig, name: str, init: ScaleOut, *, like: ModelConfig
) -> list[StoredModel]:
  """The models that are mixed in, without arrays and tokenizers."""
  found = []
  for i, given in enumerate(init.sources):
    what = f"config.stages.{name}.init.sources[{i}]"
    if given in experiment.stages:
      other = _end(experiment, given)
    else:
      header = read_header(given, what=what)
      other = _without_arrays(header.config, header.lineage)
    scale_out.check_same(like, other.config, what=f"{what}={given!r}")
    found.append(other)
  return found


def _end(experiment: ExperimentConfig, name: str) -> StoredModel:
  """The MODEL that a stage will leave, without arrays and tokenizer."""
  start, train = _start(experiment, name), experiment.stages[name].train
  steps = budget.total_steps(experiment, name)
  event = Event(kind="train", steps=steps, options=records.plain(train))
  return _without_arrays(
    trained(
      start.config, train, steps=steps, path=f"config.stages.{name}.train"
    ),
    start.lineage.then(event),
  )


def _without_arrays(config: ModelConfig, lineage: Lineage) -> StoredModel:
  return StoredModel(config=config, lineage=lineage, params={}, tokenizer=None)
