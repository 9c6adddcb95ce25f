"""One stage: its start, its training, its MODEL, its evaluation.

  STAGE/
    stage.json        config, lineage at the start, losses around the transform
    checkpoints/      of the training, with metrics.jsonl, validation.jsonl and
                      tensorboard/ beside
    result.json       steps, tokens, FLOPs, seconds and where they went
    model/            the MODEL; written last, so that it marks the stage done
    evaluation.json   scores and samples

Every file is whole or not there, and a stage that is started again goes on
after the last of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from aquila_jax.core import config as config_lib
from aquila_jax.core import processes
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import GrowthMask, ModelConfig
from aquila_jax.core.model_dir import StoredModel, save_model
from aquila_jax.core.moments import get_moments
from aquila_jax.evaluation import formats
from aquila_jax.evaluation.perplexity import Evaluator
from aquila_jax.evaluation.results import METHOD_NAMES
from aquila_jax.growth.exactness import Exactness
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import NOT_CAUSAL, is_causal
from aquila_jax.pipeline import budget, records
from aquila_jax.pipeline.initial import Start
from aquila_jax.planning import counting
from aquila_jax.training.checkpointing import check_same, saved_config
from aquila_jax.training.growth_mask import mask_schedule, trained
from aquila_jax.training.inputs import prepared_input
from aquila_jax.training.loop import TrainJob, TrainResult, train
from aquila_jax.training.state import InitialModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
  """How a stage started: what stage.json says."""

  config: dict[str, Any]  # of `_identity`
  total_steps: int
  lineage: list[dict[str, Any]]  # before the training
  # Validation losses: of the source, and right after each method.
  transform_losses: dict[str, float]
  # Of the model that the training starts from.
  growth_mask: dict[str, Any] | None = None


# An evaluator on a little validation text, of one architecture or another.
_Evaluators = Callable[[ModelConfig], Evaluator]


def run_stage(
  start: Start,
  directory: epath.Path,
  *,
  profile_steps: tuple[int, int] | None = None,
  save_optimizer: bool = True,
) -> None:
  """Trains a stage to its end, from wherever its directory stands.

  Args:
    start: where the weights come from.
    directory: of the stage.
    profile_steps: first and last step to profile, or None.
    save_optimizer: whether the MODEL gets the optimizer state.

  Raises:
    errors.UserError: on a config that does not fit, or that the directory was
      not made with.
    errors.TrainingStopped: on a loss that is not finite.
    Interrupted: after SIGTERM or SIGINT, when the step is saved.
  """
  context, name = start.context, start.name
  check_unchanged(start, directory)
  found = records.read(directory / "stage.json")
  if is_done(directory):
    context.say(f"{name}: done")
    return
  evaluators, initial = _evaluators(start), _Initial(start)
  if found is None:
    opening = _open(start, initial.look(), evaluators)
    records.write(directory / "stage.json", dataclasses.asdict(opening))
  else:
    opening = Opening(**found)
  job = _job(start, opening, directory, evaluators=evaluators, initial=initial)
  result = train(dataclasses.replace(job, profile_steps=profile_steps))
  _finish(start, opening, result, directory, save_optimizer=save_optimizer)


def job_of(start: Start, directory: epath.Path) -> TrainJob:
  """The training of a stage that has begun.

  Raises:
    errors.UserError: where its record is damaged.
  """
  found = records.read(directory / "stage.json")
  assert found is not None, "the stage has not begun"
  return _job(
    start,
    Opening(**found),
    directory,
    evaluators=_evaluators(start),
    initial=_Initial(start),
  )


def _evaluators(start: Start) -> _Evaluators:
  return functools.cache(
    functools.partial(
      start.context.evaluator,
      split="validation",
      sequence_length=start.stage.train.sequence_length,
      max_tokens=start.stage.train.evaluate_tokens,
    )
  )


class _Initial:
  """A stage's model before its training: grown once, and held no longer."""

  def __init__(self, start: Start):
    self._start = start
    self._model: StoredModel | None = None

  def look(self) -> StoredModel:
    if self._model is None:
      self._model = self._start.model()
    return self._model

  def take(self) -> InitialModel:
    """Hands the model over. Training has no room for it and its source."""
    model, self._model = self.look(), None
    self._start.forget_source()
    return InitialModel(
      params=model.params, moments=model.moments, ema=model.ema
    )


def check_unchanged(start: Start, directory: epath.Path) -> None:
  """Refuses a directory that another config has begun.

  Args:
    start: of the stage.
    directory: of the stage; it need not be there.

  Raises:
    errors.UserError: listing the fields that differ.
  """
  path = directory / "stage.json"
  found = records.read(path)
  if found is not None:
    check_same(found["config"], _identity(start), what=path, path=start.path)


def is_done(directory: epath.Path) -> bool:
  """Whether the stage has left its MODEL."""
  marker = directory / "model" / "config.json"
  return processes.from_first(marker.exists, name="stage done")


def _identity(start: Start) -> dict[str, Any]:
  """What must not change between two starts of a stage, as plain JSON."""
  context = start.context
  others = {
    "init": config_lib.to_dict(start.stage.init),
    "seed": context.stage_seed(start.name),
    "data": context.data.digest,
    "data_seed": context.experiment.data.seed,
  }
  return records.plain(
    saved_config(
      model=start.stage.model, train=start.stage.train, others=others
    )
  )


def _open(start: Start, model: StoredModel, evaluators: _Evaluators) -> Opening:
  """Measures the transform, and says what the stage starts with."""
  mask = model.config.growth_mask
  mask_schedule(start.stage.train, mask, path=f"{start.path}.train")
  losses = _transform_losses(start, model, evaluators)
  steps = budget.total_steps(start.context.experiment, start.name)
  for line in _announcement(start, model, losses, steps):
    start.context.say(f"{start.name}: {line}")
  return Opening(
    config=_identity(start),
    total_steps=steps,
    lineage=records.plain(model.lineage.to_json()),
    transform_losses=losses,
    growth_mask=records.plain(mask),
  )


def _model_config(start: Start, opening: Opening) -> ModelConfig:
  """The architecture at the start of the training, also when it is resumed.

  It is the stage's, under the growth mask of the model that the stage starts
  from: the config of a stage says nothing of that.
  """
  mask = opening.growth_mask
  return dataclasses.replace(
    start.stage.model,
    growth_mask=None
    if mask is None
    else config_lib.build(GrowthMask, mask, path="growth_mask"),
  )


def _transform_losses(
  start: Start, model: StoredModel, evaluators: _Evaluators
) -> dict[str, float]:
  """Validation loss of the source, and right after each method."""
  source, init = start.source, start.stage.init
  method = getattr(init, "method", "")
  if source is None or not method:
    return {}

  def loss(found: StoredModel) -> float:
    return evaluators(found.config)(found.params)["loss"]

  losses = {"source": loss(source)}
  for other in getattr(init, "compare", ()):
    if other != method:
      losses[other] = loss(start.model(other))
  losses[method] = loss(model)
  return losses


def _announcement(
  start: Start, model: StoredModel, losses: dict[str, float], steps: int
) -> list[str]:
  stage, source = start.stage, start.source
  size = counting.in_words(counting.count(model.config).total.parameters)
  tokens = counting.in_words(steps * stage.train.tokens_per_step)
  lines = [f"{size} parameters, {steps:,} steps, {tokens} tokens"]
  if source is not None:
    before = counting.in_words(counting.count(source.config).total.parameters)
    lines[0] = f"{before} to {lines[0]}"
    moments = "Adam starts afresh"
    if model.moments is not None:
      moments = (
        "the optimizer state goes on from step"
        f" {int(np.asarray(model.moments.count)):,}"
      )
    lines.append(moments)
    lines += _schedule_in_words(start, model, steps)
  if not is_causal(model.config):
    lines.append(f"warning: {NOT_CAUSAL}; losses and scores know the future")
  mask = model.config.growth_mask
  if mask is not None:
    after = trained(model.config, stage.train, steps=steps, path="").growth_mask
    reached = 1.0 if after is None else after.value
    lines.append(f"the growth mask rises from {mask.value:g} to {reached:g}")
  growth = model.lineage.events[-1].growth if model.lineage.events else None
  if growth is not None:
    exact = Exactness.from_json(growth)
    lines.append(
      f"{METHOD_NAMES.get(growth['method'], growth['method'])},"
      f" predicted {exact.in_words()}"
    )
  if losses:
    shown = ", ".join(
      f"{METHOD_NAMES.get(method, method)} {formats.loss(loss)}"
      for method, loss in losses.items()
    )
    lines.append(f"validation loss around the transform: {shown}")
  return lines


def _schedule_in_words(
  start: Start, model: StoredModel, steps: int
) -> list[str]:
  """Where the learning rate starts, unless as in a stage from scratch."""
  optimizer, before = start.stage.train.optimizer, model.lineage.trained_steps
  if optimizer.continuation == "restart" and before is not None:
    return ["the learning rate starts at its peak, without warm-up"]
  if optimizer.continuation == "keep" and before:
    return [
      f"the learning rate goes on from step {before:,} of {before + steps:,}"
    ]
  return []


def _job(
  start: Start,
  opening: Opening,
  directory: epath.Path,
  *,
  evaluators: _Evaluators,
  initial: _Initial,
) -> TrainJob:
  context, stage = start.context, start.stage
  model = _model_config(start, opening)
  evaluator = evaluators(model)
  mask = mask_schedule(
    stage.train, model.growth_mask, path=f"{start.path}.train"
  )
  lineage = Lineage.from_json(opening.lineage)
  seed = context.experiment.data.seed
  return TrainJob(
    stage=start.name,
    model=model,
    train=stage.train,
    total_steps=opening.total_steps,
    mesh=context.mesh,
    workdir=directory,
    input=prepared_input(
      context.data, train=stage.train, seed=seed, mesh=context.mesh
    ),
    data_state=context.data_state(lineage, name=start.name),
    initial=initial.take,
    flops_per_token=budget.token_flops(stage),
    seed=opening.config["seed"],
    new_indices=lineage.new_indices,
    copies=lineage.copies,
    trained_steps=lineage.trained_steps,
    identity={
      key: opening.config[key] for key in ("init", "seed", "data", "data_seed")
    },
    evaluate=lambda params, step: evaluator(
      params, mask_value=None if mask is None else mask.at(step)
    ),
    # Under a mask as a stage ends, so that only the router moves.
    route=None
    if model.moe is None
    else lambda params: evaluator.route(
      params, mask_value=None if mask is None else 1.0
    ),
    config_path=start.path,
  )


def _finish(
  start: Start,
  opening: Opening,
  result: TrainResult,
  directory: epath.Path,
  *,
  save_optimizer: bool,
) -> None:
  """Writes the result, and then the MODEL."""
  stage = start.stage
  numbers = {
    "steps": result.steps,
    "tokens": result.tokens,
    "flops": result.flops,
    "wall_s": result.wall_s,
    "spent_s": result.spent_s,
  }
  records.write(directory / "result.json", numbers)
  event = Event(
    kind="train",
    name=start.name,
    options=records.plain(stage.train),
    steps=result.steps,
    tokens=result.tokens,
    flops=result.flops,
    data_state=result.data_state.to_json() | start.context.data_identity,
  )
  state = result.state
  config = trained(
    _model_config(start, opening),
    stage.train,
    steps=result.steps,
    path=f"{start.path}.train",
  )
  stored = StoredModel(
    config=config,
    lineage=Lineage.from_json(opening.lineage).then(event),
    params=state.params,
    tokenizer=start.context.data.tokenizer_text,
    moments=get_moments(state.opt_state) if save_optimizer else None,
    ema=state.ema,
  )
  axes = decoder_lm.parameter_axes(config)
  save_model(directory / "model", stored, axes=axes)
  start.context.say(f"{start.name}: wrote {directory / 'model'}")
