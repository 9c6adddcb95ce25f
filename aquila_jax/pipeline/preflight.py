"""Everything that can be refused before the first step of the first stage."""

from __future__ import annotations

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
from aquila_jax.core.model_dir import StoredModel, read_header
from aquila_jax.generation.generate import encode_prompts
from aquila_jax.growth import scale_out, scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import budget, initial, records
from aquila_jax.pipeline.context import Context
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import inputs, step
from aquila_jax.training.freezing import trainable_masks
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
  """Checks one stage: its start, mesh, optimizer and what is frozen."""
  stage, path = experiment.stages[name], f"config.stages.{name}"
  lineage = _check_start(experiment, name)
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


def _check_start(experiment: ExperimentConfig, name: str) -> Lineage:
  """Checks a stage against its source; the lineage that it will start with."""
  stage = experiment.stages[name]
  source = budget.source_of(stage)
  if not source:
    return Lineage(events=(Event(kind="scratch"),))
  init, path = stage.init, f"config.stages.{name}.model"
  if source in experiment.stages:
    # It may not be trained yet.
    config = experiment.stages[source].model
    lineage = _trained(experiment, source)
  else:
    header = read_header(source, what=initial.source_field(stage, name))
    config, lineage = header.config, header.lineage
  if isinstance(init, ScaleOut):
    scale_out.check_pair(config, stage.model, path=path)
    return lineage.then(Event(kind="scale_out"))
  if isinstance(init, ScaleUp):
    for method in init.compare:
      if method != init.method:
        options = initial.with_method(init, method)
        scale_up.plan_growth(config, stage.model, options, path=path)
    model = StoredModel(
      config=config,
      lineage=lineage,
      params=decoder_lm.abstract_params(config),
      tokenizer=None,
    )
    # Another seed draws other maps; what can be refused is the same.
    return scale_up.grown_header(
      model, stage.model, init, seed=0, name=name, path=path
    ).lineage
  initial.check_same_architecture(config, stage.model, path=path)
  return lineage


def _trained(experiment: ExperimentConfig, name: str) -> Lineage:
  """The lineage of the MODEL that a stage will leave."""
  event = Event(
    kind="train",
    steps=budget.total_steps(experiment, name),
    options=records.plain(experiment.stages[name].train),
  )
  return _check_start(experiment, name).then(event)
