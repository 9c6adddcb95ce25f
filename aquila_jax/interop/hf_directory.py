"""A Hugging Face directory: config.json, *.safetensors, tokenizer.

Nothing is unpickled: only JSON and safetensors are read.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import tokenizers

from aquila_jax.core import errors
from aquila_jax.interop.fields import listed
from aquila_jax.interop.tensors import TensorInfo

_INDEX = "model.safetensors.index.json"
# Name in a file -> dtype that it is read as. Half precision has a range that
# bfloat16 does not resolve; float32 holds both.
_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(jnp.bfloat16),
  "F16": np.dtype(np.float32),
}
# Buffers that old versions of transformers saved; they follow from the config.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")


class HFDirectory:
  """Reads a directory as `save_pretrained` writes it.

  Args:
    path: the directory.
    what: the flag that named it, for messages.

  Raises:
    errors.UserError: where there is no config.json, no safetensors, or a file
      is truncated or missing; it lists them all.
  """

  def __init__(self, path: pathlib.Path, *, what: str):
    self.path = path
    if not (path / "config.json").is_file():
      raise errors.UserError(
        f"{what}={str(path)!r}: expected a Hugging Face directory, with"
        " config.json, or a .gguf file"
      )
    self.config = read_json(path / "config.json")
    self._files: dict[str, Any] = {}
    problems = self._open(_shards(path, what=what))
    if problems:
      raise errors.UserError(listed(f"{what}={str(path)!r}", problems))
    self.tensors = self._described()

  def _open(self, shards: list[str]) -> list[str]:
    problems = []
    owners: dict[str, str] = {}
    for name in shards:
      file = self.path / name
      if not file.is_file():
        problems.append(f"{name} is missing")
        continue
      try:
        # A context manager only in name: it closes nothing.
        self._files[name] = safetensors.safe_open(str(file), framework="numpy")
      except (safetensors.SafetensorError, OSError) as error:
        problems.append(f"{name} is truncated or damaged: {error}")
        continue
      for tensor in self._files[name].keys():  # noqa: SIM118 - no mapping
        if tensor in owners:
          problems.append(f"{tensor} is in both {owners[tensor]} and {name}")
        owners[tensor] = name
    return problems

  def _described(self) -> dict[str, TensorInfo]:
    found = {}
    for file, opened in self._files.items():
      for name in opened.keys():  # noqa: SIM118 - no mapping
        part = opened.get_slice(name)
        found[name] = TensorInfo(
          shape=tuple(part.get_shape()), dtype=part.get_dtype(), file=file
        )
    return found

  def refusal(self, info: TensorInfo) -> str | None:
    if info.dtype in _DTYPES:
      return None
    return f"type {info.dtype}; expected one of {', '.join(_DTYPES)}"

  def read(self, name: str) -> np.ndarray:
    info = self.tensors[name]
    value = self._files[info.file].get_tensor(name)
    return value.astype(_DTYPES[info.dtype], copy=False)

  @property
  def derived(self) -> frozenset[str]:
    """Tensors that say what the config already has."""
    return frozenset(name for name in self.tensors if _DERIVED.search(name))

  @property
  def dtype(self) -> str:
    """The dtype that holds every tensor exactly, as ModelConfig names it.

    But for float64, which is rounded: models compute in float32 at most.
    """
    found = {i.dtype for n, i in self.tensors.items() if n not in self.derived}
    return "bfloat16" if found == {"BF16"} else "float32"

  def texts(self, *, with_tokenizer: bool = True) -> Texts:
    """Tokenizer, stop tokens and chat template, those that are there.

    Args:
      with_tokenizer: whether to read the tokenizer.

    Raises:
      errors.UserError: where one of the files cannot be read.
    """
    generation = self._optional("generation_config.json")
    stop = generation.get("eos_token_id", self.config.get("eos_token_id"))
    if stop is None:
      stop = self.config.get("eos_token_id")
    ids = stop if isinstance(stop, list) else [stop]
    begin = generation.get("bos_token_id")
    if begin is None:
      begin = self.config.get("bos_token_id")
    return Texts(
      tokenizer=self._tokenizer() if with_tokenizer else None,
      stop_tokens=tuple(
        dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0)
      ),
      begin_token=begin if isinstance(begin, int) and begin >= 0 else None,
      chat_template=self._chat_template(),
    )

  def _tokenizer(self) -> str | None:
    file = self.path / "tokenizer.json"
    if not file.is_file():
      return None
    try:
      text = read_text(file)
      tokenizers.Tokenizer.from_str(text)
    # The library raises nothing narrower for a text that it cannot read.
    except Exception as error:
      raise errors.UserError(
        f"{file} is no tokenizer: {str(error).splitlines()[0]}; give"
        " --tokenizer=tokenizer.json"
      ) from error
    return text

  def _chat_template(self) -> str | None:
    """The one template, or that called default among several."""
    file = self.path / "chat_template.jinja"
    if file.is_file():
      return read_text(file)
    template = self._optional("tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
      named = [entry for entry in template if isinstance(entry, dict)]
      by_name = {entry.get("name"): entry.get("template") for entry in named}
      template = by_name.get("default")
    return template if isinstance(template, str) else None

  def _optional(self, name: str) -> Mapping[str, Any]:
    file = self.path / name
    return read_json(file) if file.is_file() else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
  """What comes with a model beside its tensors."""

  tokenizer: str | None  # the text of tokenizer.json
  stop_tokens: tuple[int, ...]
  begin_token: int | None
  chat_template: str | None


def read_text(file: pathlib.Path) -> str:
  """The characters of a UTF-8 file, its line ends as they are.

  Raises:
    errors.UserError: where it is not UTF-8.
  """
  try:
    return file.read_bytes().decode("utf-8")
  except UnicodeDecodeError as error:
    raise errors.UserError(f"{file} is no text: {error}") from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    errors.UserError: where it is none.
  """
  try:
    tree = json.loads(read_text(file))
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{file} is no JSON: {error}") from error
  if not isinstance(tree, dict):
    raise errors.UserError(f"{file}: expected an object")
  return tree


def _shards(path: pathlib.Path, *, what: str) -> list[str]:
  """The files of tensors: what an index names, or all there are."""
  if (path / _INDEX).is_file():
    shards = read_json(path / _INDEX).get("weight_map")
    if not isinstance(shards, dict):
      raise errors.UserError(f"{path / _INDEX}: has no weight_map")
    return sorted({str(name) for name in shards.values()})
  if (path / "model.safetensors").is_file():
    return ["model.safetensors"]
  found = sorted(file.name for file in path.glob("*.safetensors"))
  if found:
    return found
  pickled = sorted(file.name for file in path.glob("*.bin"))
  raise errors.UserError(
    f"{what}={str(path)!r}: has no *.safetensors"
    + (
      f"; {pickled[0]} is a pickle, which is not read: save it again with"
      " save_pretrained(safe_serialization=True)"
      if pickled
      else ""
    )
  )
