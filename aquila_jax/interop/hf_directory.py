"""A Hugging Face directory: config.json, *.safetensors, tokenizer.

Nothing is unpickled: only JSON and safetensors are read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

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

  def _open(self, shards: list[str]) -> list[str]:
    problems = []
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
    return problems

  @functools.cached_property
  def tensors(self) -> dict[str, TensorInfo]:
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
  def dtype(self) -> str:
    """The dtype that holds every tensor exactly, as ModelConfig names it."""
    found = {
      _DTYPES[i.dtype] for i in self.tensors.values() if i.dtype in _DTYPES
    }
    for dtype in (np.float64, np.float32):
      if np.dtype(dtype) in found:
        return np.dtype(dtype).name
    return "bfloat16" if found else "float32"

  @property
  def texts(self) -> Texts:
    """Tokenizer, stop tokens and chat template, those that are there."""
    tokenizer = self.path / "tokenizer.json"
    generation = self._optional("generation_config.json")
    stop = generation.get("eos_token_id", self.config.get("eos_token_id"))
    if stop is None:
      stop = self.config.get("eos_token_id")
    ids = stop if isinstance(stop, list) else [stop]
    return Texts(
      tokenizer=tokenizer.read_text("utf-8") if tokenizer.is_file() else None,
      stop_tokens=tuple(i for i in ids if isinstance(i, int) and i >= 0),
      chat_template=self._chat_template(),
    )

  def _chat_template(self) -> str | None:
    file = self.path / "chat_template.jinja"
    if file.is_file():
      return file.read_text("utf-8")
    template = self._optional("tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None

  def _optional(self, name: str) -> Mapping[str, Any]:
    file = self.path / name
    return read_json(file) if file.is_file() else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
  """What comes with a model beside its tensors."""

  tokenizer: str | None  # the text of tokenizer.json
  stop_tokens: tuple[int, ...]
  chat_template: str | None


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    errors.UserError: where it is none.
  """
  try:
    tree = json.loads(file.read_text("utf-8"))
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
