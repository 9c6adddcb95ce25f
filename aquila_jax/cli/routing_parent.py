"""What the experts of a MODEL were made of: its parent, and which units of it.

Growth numbers the experts (growth/upcycling.py) and the lineage says which
growth it was, so that a parent of the right sizes is all that is needed.
"""

from __future__ import annotations

from absl import logging
from etils import epath

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.lineage import Event
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import ModelReader, open_model
from aquila_jax.evaluation.routing.cosines import Family, Origin
from aquila_jax.growth.upcycling import Upcycling, make_upcycling
from aquila_jax.models import decoder_lm


def find_family(
  model: ModelReader, *, path: str, given: str | None
) -> tuple[Family | None, str]:
  """The parent, and what each expert has of it.

  Args:
    model: a mixture.
    path: where it lies.
    given: the value of --parent; None is the parent of the lineage, where it is
      there and fits, "" is none.

  Returns:
    The family and the same in words; None and why not.

  Raises:
    errors.UserError: where the parent that was given is none of this model.
  """
  if given == "":
    return None, "No parent was asked for."
  event = _last_growth(model)
  if given is not None:
    return _family(model, event, given)
  if event is None or event.kind != "scale_out":
    return None, "No parent: the model's last growth made no experts."
  found = _located(event.parent, path)
  if found is None:
    return None, (
      f"No parent: the model was made of {event.parent!r}, which is not there;"
      " --parent names it."
    )
  try:
    return _family(model, event, found)
  except errors.UserError as error:
    logging.warning("without the lineage's parent: %s", error)
    return None, f"No parent: {found!r} does not fit any more."


def _last_growth(model: ModelReader) -> Event | None:
  kinds = ("scale_up", "scale_out")
  events = [e for e in model.model.lineage.events if e.kind in kinds]
  return events[-1] if events else None


def _located(parent: str, path: str) -> str | None:
  """A MODEL as the lineage has it: a path, or a stage of the same workdir."""
  here = epath.Path(path).expanduser()
  stage = here.absolute().parent.parent / parent / "model"
  for candidate in (epath.Path(parent).expanduser(), stage):
    if parent and (candidate / "config.json").exists():
      return str(candidate)
  return None


def _family(
  model: ModelReader, event: Event | None, path: str
) -> tuple[Family, str]:
  parent = open_model(path, like=decoder_lm.abstract_params, what="--parent")
  options = _options(event, path)
  old, new = parent.model.config, model.model.config
  try:
    way = make_upcycling(old, new, options, path="--model")
  except errors.UserError as error:
    raise errors.UserError(
      f"--parent={path!r}: this model is not made of it: {error}"
    ) from error
  _refuse_copied_shards(model, way, path)
  family = Family(config=old, params=parent.params, origins=origins(way, new))
  return family, (
    f"The parent is {path}, and this is made of it: {way.in_words()}."
  )


def _options(event: Event | None, path: str) -> ScaleOut:
  """What numbers the experts as the growth did: which models there were.

  Copies and shards follow from the sizes, and the method of noise takes any.
  """
  others = () if event is None else tuple(event.options.get("sources", ()))
  method = "branch_train_mix" if others else "noise"
  return ScaleOut(source=path, method=method, sources=others, optimizer="reset")


def _refuse_copied_shards(
  model: ModelReader, way: Upcycling, path: str
) -> None:
  """Refuses a grandparent where copies of shards are numbered otherwise."""
  made = [
    event.options.get("moe") is not None
    for event in model.model.lineage.events
    if event.kind == "scale_out"
  ]
  is_grandparent = way.of_source is None and made[-2:] == [True, True]
  if is_grandparent and way.shards > 1:
    raise errors.UserError(
      f"--parent={path!r}: the model is made of a mixture whose experts are"
      " shards of this one; expected that mixture"
    )


def origins(way: Upcycling, config: ModelConfig) -> list[Origin | None]:
  """What each expert was made of.

  Args:
    way: from the parent to the mixture.
    config: of the mixture.

  Returns:
    One for each expert; None of another model than the parent.
  """
  moe = config.moe
  assert moe is not None
  parents = [way.parent(expert) for expert in range(moe.num_experts)]
  return [
    Origin(expert=parent.expert, units=parent.units)
    if parent.model == 0
    else None
    for parent in parents
  ]
