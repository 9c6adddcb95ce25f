"""A published checkpoint as a MODEL directory, tensor by tensor.

Every tensor is accounted for: what is missing, unexpected, of another shape or
type, or not finite is listed in one error, and no output is left behind. One
tensor at a time is in memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from aquila_jax.core import errors, model_dir
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.interop import export_record, families, layout
from aquila_jax.interop.families import IdleTensor
from aquila_jax.interop.fields import listed
from aquila_jax.interop.gguf_file import GGUFFile
from aquila_jax.interop.hf_directory import HFDirectory, Texts
from aquila_jax.interop.tensors import (
  TensorSource,
  count_not_finite,
  has_only_finite,
)
from aquila_jax.models import decoder_lm

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """A checkpoint of any format, and how it becomes a model."""

  source: TensorSource
  config: ModelConfig
  names: Mapping[str, str]
  texts: Texts
  # Tensors that change nothing, where the model has none.
  idle: Mapping[str, IdleTensor]
  # Tensors that repeat another one: name -> which.
  repeats: Mapping[str, str]
  # Tensors that say what the config already has.
  derived: frozenset[str]
  lineage: Lineage
  family: str
  unknown: list[str]  # keys of the configuration


def open_checkpoint(
  path: str | os.PathLike[str],
  *,
  dtype: str = "",
  with_tokenizer: bool = True,
  what: str = "source",
) -> Checkpoint:
  """Reads what a checkpoint says of itself.

  Args:
    path: a Hugging Face directory or a .gguf file.
    dtype: of the parameters; "" is the checkpoint's own.
    with_tokenizer: whether to read its tokenizer; not where another one will
      be given, since it may be of a kind that is not known.
    what: the flag that named it, for messages.

  Returns:
    The checkpoint.

  Raises:
    errors.UserError: where it cannot be read or represented; all reasons.
  """
  location = pathlib.Path(path).expanduser()
  if location.is_dir():
    source = HFDirectory(location, what=what)
    texts = source.texts(with_tokenizer=with_tokenizer)
    return _of_directory(source, texts, dtype=dtype)
  if not location.is_file():
    raise errors.UserError(f"{what}={str(path)!r}: there is no such file")
  source = GGUFFile(location, what=what)
  texts = source.texts(with_tokenizer=with_tokenizer)
  return _of_gguf(source, texts, dtype=dtype)


def _of_directory(
  source: HFDirectory, texts: Texts, *, dtype: str
) -> Checkpoint:
  file = str(source.path / "config.json")
  own = dtype or source.dtype
  family, config, unknown = families.read_config(
    source.config, what=file, dtype=own
  )
  record = export_record.read(source.path, config_tree=source.config)
  if record is not None:
    config = dataclasses.replace(
      record.config,
      param_dtype=own,
      compute_dtype=record.config.compute_dtype if not dtype else own,
    )
    unknown = []
  repeats = {}
  if config.tied_embeddings:
    repeats["lm_head.weight"] = "model.embed_tokens.weight"
  return Checkpoint(
    source=source,
    config=config,
    names=family.tensors,
    texts=texts,
    idle=families.idle_tensors(family, config) if record else {},
    repeats=repeats,
    derived=source.derived,
    lineage=record.lineage if record else Lineage(),
    family=family.model_type,
    unknown=unknown,
  )


def _of_gguf(source: GGUFFile, texts: Texts, *, dtype: str) -> Checkpoint:
  return Checkpoint(
    source=source,
    config=source.model_config(dtype or source.dtype),
    names=source.names,
    texts=texts,
    idle={},
    repeats={},
    derived=source.derived,
    lineage=Lineage(),
    family=source.architecture,
    unknown=source.unknown,
  )


def import_model(
  checkpoint: Checkpoint,
  output: str | os.PathLike[str],
  *,
  parent: str,
  tokenizer: str | None = None,
  progress: Progress,
) -> StoredModel:
  """Writes a checkpoint as a MODEL directory, whole or not at all.

  Args:
    checkpoint: of `open_checkpoint`.
    output: the MODEL directory; it must not exist.
    parent: where it came from, for the lineage.
    tokenizer: the text of a tokenizer.json in place of the checkpoint's.
    progress: told how far it is.

  Returns:
    The model, with shapes for parameters.

  Raises:
    errors.UserError: listing every tensor that is missing, unexpected, of
      another shape or type, or not finite.
  """
  config = checkpoint.config
  slots = layout.slots(config, checkpoint.names)
  problems = account(checkpoint, slots)
  event = Event(
    kind="import", parent=parent, options={"family": checkpoint.family}
  )
  texts = checkpoint.texts
  stored = StoredModel(
    config=config,
    lineage=checkpoint.lineage.then(event),
    params=decoder_lm.abstract_params(config),
    tokenizer=tokenizer if tokenizer is not None else texts.tokenizer,
    stop_tokens=texts.stop_tokens,
    begin_token=texts.begin_token,
    chat_template=texts.chat_template,
  )
  if not problems.sound:
    # What can be read is read too, so that one error says all.
    _find_not_finite(checkpoint.source, slots, problems)
    _check_contents(checkpoint, problems)
    raise problems.error(parent)
  axes = decoder_lm.parameter_axes(config)
  dtype = jnp.dtype(config.param_dtype)
  with model_dir.writing(output, stored, axes=axes) as writer:
    for number, slot in enumerate(slots):
      part = _checked_part(checkpoint.source, slot, dtype, problems=problems)
      if problems.sound:
        writer.params.write(slot.leaf, part, index=slot.index)
      del part  # before the next is read
      if number % 100 == 99:
        progress(f"{number + 1} of {len(slots)} tensors")
    _check_contents(checkpoint, problems)
    if not problems.sound:
      raise problems.error(parent)
  return stored


class Problems:
  """What is wrong with the tensors of a checkpoint, in order of finding."""

  def __init__(self):
    self._lines: list[str] = []
    self.unreadable: set[str] = set()

  @property
  def sound(self) -> bool:
    return not self._lines

  def add(self, tensor: str, problem: str) -> None:
    """Keeps a complaint about a tensor, which is then not read."""
    self._lines.append(f"{tensor}: {problem}")
    self.unreadable.add(tensor)

  def not_finite(self, tensor: str, value: np.ndarray) -> None:
    """Keeps that a tensor has NaN or infinite elements."""
    count = count_not_finite(value)
    self.add(tensor, f"{count} of {value.size} elements are not finite")

  def beyond_range(self, tensor: str, part: np.ndarray) -> None:
    """Keeps that a tensor has elements that its dtype here cannot hold."""
    self.add(
      tensor,
      f"{count_not_finite(part)} of {part.size} elements are beyond the range"
      f" of {part.dtype.name}",
    )

  def error(self, what: str) -> errors.UserError:
    return errors.UserError(listed(what, self._lines))


def account(checkpoint: Checkpoint, slots: list[layout.Slot]) -> Problems:
  """Compares what a model needs with what a checkpoint says it has."""
  found = checkpoint.source.tensors
  needed = {slot.tensor: slot.shape for slot in slots}
  needed |= {name: tensor.shape for name, tensor in checkpoint.idle.items()}
  problems = Problems()
  for name, shape in needed.items():
    if name not in found:
      problems.add(name, f"is missing; expected shape {list(shape)}")
    elif not _same_shape(found[name].shape, shape):
      problems.add(
        name, f"has shape {list(found[name].shape)}; expected {list(shape)}"
      )
  for name, info in found.items():
    refusal = checkpoint.source.refusal(info)
    if refusal is not None:
      problems.add(name, f"has {refusal}")
    if name not in needed and not (
      name in checkpoint.derived or name in checkpoint.repeats
    ):
      problems.add(name, f"is unexpected; in {info.file}")
  return problems


def _same_shape(found: tuple[int, ...], needed: tuple[int, ...]) -> bool:
  """Whether two shapes differ by dimensions of 1 at most, and those in front.

  A vector may be kept as [n] or [1, n].
  """
  return math.prod(found) == math.prod(needed) and [
    n for n in found if n != 1
  ] == [n for n in needed if n != 1]


def _checked_part(
  source: TensorSource,
  slot: layout.Slot,
  dtype: jnp.dtype,
  *,
  problems: Problems,
) -> np.ndarray:
  """The part of a leaf that a tensor holds, in the leaf's dtype."""
  value = source.read(slot.tensor).reshape(slot.shape)
  with np.errstate(over="ignore"):  # looked for below
    part = slot.to_part(value).astype(dtype, copy=False)
  if not has_only_finite(value):
    problems.not_finite(slot.tensor, value)
  elif value.dtype != dtype and not has_only_finite(part):
    problems.beyond_range(slot.tensor, part)
  return part


def _find_not_finite(
  source: TensorSource, slots: list[layout.Slot], problems: Problems
) -> None:
  for name in dict.fromkeys(slot.tensor for slot in slots):
    if name not in problems.unreadable:
      value = source.read(name)
      if not has_only_finite(value):
        problems.not_finite(name, value)


def _check_contents(checkpoint: Checkpoint, problems: Problems) -> None:
  """Tensors that the model does not hold must say what it says without them."""
  source = checkpoint.source
  for name, tensor in checkpoint.idle.items():
    if name in problems.unreadable:
      continue
    if np.any(source.read(name) != tensor.value):
      expected = "ones" if tensor.value else "zeros"
      problems.add(name, f"expected {expected}, by {export_record.NAME}")
  for name, original in checkpoint.repeats.items():
    if (
      name in source.tensors
      and not {name, original} & problems.unreadable
      and not np.array_equal(source.read(name), source.read(original))
    ):
      problems.add(
        name, f"differs from {original}, though tie_word_embeddings is true"
      )
