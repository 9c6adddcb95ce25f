"""Flags and lines that the verbs of single models share."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import tokenizers
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors, files
from aquila_jax.core.experiment_config import (
  LARGEST_SEED,
  ExperimentConfig,
  MeshConfig,
)
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import (
  ModelReader,
  StoredModel,
  load_model,
  open_model,
  save_model,
)
from aquila_jax.interop.import_model import Checkpoint, import_model
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.planning import counting
from aquila_jax.sharding.explain import explain
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import laid_out, param_shardings

T = TypeVar("T")


def define_stage() -> flags.FlagHolder:
  """Defines --stage, for the commands that take a config of one stage."""
  return flags.DEFINE_string(
    "stage", "", "The stage of the config; needed where it has several."
  )


def define_explain_sharding() -> flags.FlagHolder[bool]:
  """Defines --explain_sharding, for the commands that train."""
  holder: Any = flags.DEFINE_bool(
    "explain_sharding",
    False,
    "Prints where every parameter lies on the mesh, and does nothing else.",
  )
  return holder


def define_replay_step() -> flags.FlagHolder[int]:
  """Defines --replay_step, for the commands that train."""
  holder: Any = flags.DEFINE_integer(
    "replay_step",
    0,
    "Takes this step of a run in WORKDIR again, alone, and says what its batch"
    " is and does: rows, gradients by leaf; nothing of the run is changed.",
    lower_bound=0,
  )
  return holder


def explain_sharding(experiment: ExperimentConfig, names: Sequence[str]) -> str:
  """Tables of those stages.

  Raises:
    errors.UserError: where mesh, devices and models do not fit each other.
  """
  mesh, tables = make_mesh(experiment.mesh), []
  for name in names:
    model = experiment.stages[name].model
    axes = decoder_lm.parameter_axes(model)
    shapes = decoder_lm.abstract_params(model)
    tables.append(f"{name}\n{explain(axes, shapes, mesh=mesh)}")
  return "\n\n".join(tables)


def define_seed(meaning: str) -> flags.FlagHolder[int]:
  """Defines --seed; `meaning` is its help."""
  holder: Any = flags.DEFINE_integer(
    "seed", 0, meaning, lower_bound=0, upper_bound=LARGEST_SEED
  )
  return holder


def define_param_dtype() -> flags.FlagHolder[str]:
  """Defines --param_dtype, for the commands that import."""
  holder: Any = flags.DEFINE_enum(
    "param_dtype",
    "",
    ["", "float32", "bfloat16"],
    "Of the parameters and of computing; the source's own by default, float32"
    " of what is quantized.",
  )
  return holder


def read_tokenizer_flag(path: str) -> str | None:
  """The text of --tokenizer, or None where it was not given.

  Raises:
    errors.UserError: where it cannot be read.
  """
  if not path:
    return None
  try:
    text = epath.Path(path).expanduser().read_text(encoding="utf-8")
    tokenizers.Tokenizer.from_str(text)
  # The library raises nothing narrower for a text that it cannot read.
  except Exception as error:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    raise errors.UserError(
      f"--tokenizer={path!r}: cannot be read ({reason}); expected a"
      " tokenizer.json"
    ) from error
  return text


def import_checkpoint(
  checkpoint: Checkpoint,
  output: str,
  *,
  parent: str,
  tokenizer: str | None = None,
) -> None:
  """Writes the MODEL of --output from a checkpoint, and says what it is."""
  if checkpoint.unknown:
    logging.warning(
      "not understood, and left out: %s", ", ".join(checkpoint.unknown)
    )
  stored = import_model(
    checkpoint,
    output,
    parent=parent,
    tokenizer=tokenizer,
    progress=now_and_then(),
  )
  if stored.tokenizer is None:
    logging.warning(
      "the source has no tokenizer.json, and the MODEL has none;"
      " --tokenizer=FILE gives it one"
    )
  else:
    ids = tokenizers.Tokenizer.from_str(stored.tokenizer).get_vocab().values()
    rows = stored.config.vocab_size
    if ids and max(ids) >= rows:
      logging.warning(
        "the tokenizer has ids up to %d, the embedding %d rows: texts with the"
        " ids above cannot be read",
        max(ids),
        rows,
      )
  print(
    f"{output}: {checkpoint.family}, {describe(stored, with_optimizer=False)}"
  )


def stage_name(
  experiment: ExperimentConfig, chosen: str, *, kind: str = ""
) -> str:
  """The stage that --stage chooses.

  Args:
    experiment: with the stages.
    chosen: the value of --stage.
    kind: of transform; where --stage is not given and just one stage of the
      pipeline has it, that one is meant.

  Returns:
    A key of `experiment.stages`.

  Raises:
    errors.UserError: where there is no such stage, or several and no choice.
  """
  fitting = [
    name
    for name in experiment.pipeline
    if experiment.stages[name].init.kind == kind
  ]
  if not chosen and len(fitting) == 1:
    (chosen,) = fitting
  experiment.stage(chosen)  # refuses what is unknown or ambiguous
  return chosen or experiment.pipeline[0]


def open_source(path: str, *, optimizer: str | None) -> ModelReader:
  """Opens the MODEL of --source, to be grown.

  Args:
    path: the value of --source.
    optimizer: the value of --optimizer; None where it was not given.

  Returns:
    The MODEL, not read yet.

  Raises:
    errors.UserError: where it is none, or an optimizer state that is not there
      is asked for.
  """
  source = open_model(path, like=decoder_lm.abstract_params, what="--source")
  if optimizer == "grow" and source.optimizer is None:
    raise errors.UserError(
      "--optimizer=grow: the source has no optimizer state; expected reset, or"
      " no --optimizer"
    )
  return source


def now_and_then(seconds: float = 3.0) -> Callable[[str], None]:
  """Says how far something is, at most every few seconds."""
  last = time.monotonic()

  def say(line: str) -> None:
    nonlocal last
    if time.monotonic() - last >= seconds:
      last = time.monotonic()
      say_on_stderr(line)

  return say


def build(cls: type[T], **values: Any) -> T:
  """A config section out of flags of the same names.

  Raises:
    errors.UserError: naming the flag.
  """
  try:
    return config_lib.build(cls, values, path="flags")
  except errors.UserError as error:
    message = str(error).replace("flags.", "--").replace("flags: ", "--")
    raise errors.UserError(message) from error


def define_mesh() -> flags.FlagHolder:
  """Defines --mesh, for the commands that only read a MODEL."""
  return flags.DEFINE_list(
    "mesh",
    [],
    "Devices that the MODEL is spread over, as in tensor=4 or"
    " expert=4,tensor=2; axes that are not named are 1.",
  )


def mesh_of(given: Sequence[str]) -> Mesh | None:
  """The mesh that --mesh describes, of the first devices; None without it.

  Raises:
    errors.UserError: where it does not, or there are fewer devices.
  """
  if not given:
    return None
  shown = f"--mesh={','.join(given)}"
  sizes: dict[str, Any] = {"data": 1}
  for part in given:
    name, _, size = part.partition("=")
    if not size.isdecimal():
      raise errors.UserError(f"{shown}: expected axes as in tensor=4")
    sizes[name] = int(size)
  try:
    config = config_lib.build(MeshConfig, sizes, path="mesh")
  except errors.UserError as error:
    raise errors.UserError(f"{shown}: {error}") from error
  needed = math.prod(dataclasses.astuple(config))
  devices = jax.devices()
  if needed > len(devices):
    raise errors.UserError(
      f"{shown}: needs {needed} devices; there are {len(devices)}"
    )
  return make_mesh(config, devices[:needed])


def load(
  path: str,
  *,
  flag: str,
  with_optimizer: bool = True,
  mesh: Mesh | None = None,
) -> StoredModel:
  """The MODEL that a flag names, its parameters spread over a mesh.

  Raises:
    errors.UserError: where it cannot be read, or the mesh does not divide it.
  """

  def like(config: ModelConfig) -> Any:
    shapes = decoder_lm.abstract_params(config)
    if mesh is None:
      return shapes
    axes = decoder_lm.parameter_axes(config)
    return laid_out(shapes, param_shardings(axes, shapes, mesh))

  return load_model(
    path, like=like, with_optimizer=with_optimizer, what=f"--{flag}"
  )


def refuse_given(*holders: flags.FlagHolder, why: str) -> None:
  """Refuses flags that were given and would have no effect.

  Args:
    *holders: the flags.
    why: that they have none, for the message.

  Raises:
    errors.UserError: naming the first that was given.
  """
  for holder in holders:
    if holder.present and not flags.FLAGS[holder.name].using_default_value:
      raise errors.UserError(f"--{holder.name}={holder.value}: {why}")


def row_length(given: int, config: ModelConfig) -> int:
  """The tokens of a row: --sequence_length, or the model's context for 0.

  Raises:
    errors.UserError: where it is longer than that.
  """
  length = given or config.context_length
  if length > config.context_length:
    raise errors.UserError(
      f"--sequence_length={length}: expected at most the model's"
      f" context_length={config.context_length}"
    )
  return length


def check_output(path: str) -> None:
  """Refuses an output that is taken, before the work and not after it.

  Raises:
    errors.UserError: where it exists, or cannot be written.
  """
  target = epath.Path(path).expanduser()
  if target.exists():
    raise errors.UserError(f"--output={path!r}: it exists; choose another")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--output={path!r}: cannot be made: {error.strerror}"
    ) from error


def save(path: str, model: StoredModel) -> None:
  """Writes the MODEL of --output, and says what it is."""
  save_model(path, model, axes=decoder_lm.parameter_axes(model.config))
  say_written(path, model, with_optimizer=model.moments is not None)


def say_written(path: str, model: StoredModel, *, with_optimizer: bool) -> None:
  """Says what a MODEL is that was written."""
  print(f"{path}: {describe(model, with_optimizer=with_optimizer)}")


def describe(model: StoredModel, *, with_optimizer: bool) -> str:
  """Size, training and optimizer state of a model, in one line."""
  total = counting.count(model.config).total
  size = counting.in_words(total.parameters)
  if total.active != total.parameters:
    size += f" parameters ({counting.in_words(total.active)} active)"
  else:
    size += " parameters"
  state = "with" if with_optimizer else "without"
  return (
    f"{size}, trained {model.lineage.steps:,} steps on"
    f" {counting.in_words(model.lineage.tokens)} tokens, {state} optimizer"
    " state"
  )


def write_json(path: str | os.PathLike[str], tree: object) -> None:
  """Writes a JSON file, whole or not at all.

  Raises:
    errors.UserError: where it cannot be written.
  """
  target = epath.Path(path).expanduser()
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tree, indent=2, ensure_ascii=False)
    files.replace_text(target, text + "\n")
  except OSError as error:
    raise errors.UserError(
      f"--output={str(path)!r}: cannot be written: {error.strerror}"
    ) from error
