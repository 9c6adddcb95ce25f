"""A MODEL directory as one that stock transformers, vLLM and llama.cpp read.

Tensor by tensor into *.safetensors shards of a bounded size, of which one is in
memory at a time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from tokenizers import Tokenizer

from aquila_jax.core import array_store, errors, model_dir
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.interop import export_record, families, layout
from aquila_jax.interop.families import Family
from aquila_jax.interop.tensors import count_not_finite
from aquila_jax.models import decoder_lm

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
  """What an export wrote."""

  architecture: str  # the class of transformers
  num_tensors: int
  num_bytes: int  # of tensors
  num_shards: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSize:
  """What an export writes, before there is one."""

  architecture: str  # the class of transformers
  num_tensors: int
  num_bytes: int
  num_shards: int
  largest_shard: int  # bytes; as much is in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Planned:
  """A tensor of the export: a part of a leaf, or idle."""

  name: str
  shape: tuple[int, ...]
  slot: layout.Slot | None
  value: int = 0  # of every element, without a slot


def export_model(
  path: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  dtype: str | None = None,
  max_shard_bytes: int = 2 * 10**9,
  end_of_text: str | None = None,
  what: str = "source",
  progress: Progress,
) -> Exported:
  """Writes a MODEL in the format of Hugging Face, whole or not at all.

  The class is chosen by what the architecture needs (families.py). Moments and
  average are left out. Importing the export gives the same MODEL without them.

  Args:
    path: the MODEL directory.
    output: the directory to write; it must not exist.
    dtype: of the tensors; None is the model's own.
    max_shard_bytes: of one file of tensors; a larger tensor has its own.
    end_of_text: the token that ends a text, where the MODEL does not name one.
    what: the flag that named the MODEL, for messages.
    progress: told how far it is.

  Returns:
    What was written.

  Raises:
    errors.UserError: where the MODEL is damaged, no stock class computes the
      same, or `dtype` does not hold a value.
  """
  source = epath.Path(path).expanduser()
  header = model_dir.read_header(source, what=what)
  config = header.config
  family, config_tree = families.write_config(config)
  target_dtype = jnp.dtype(dtype or config.param_dtype)
  reader = array_store.TreeReader(
    source / "params", decoder_lm.abstract_params(config)
  )
  tokenizer = model_dir.read_tokenizer(source) if header.has_tokenizer else None
  texts = _text_files(header, tokenizer, end_of_text=end_of_text)
  planned = _plan(family, config)
  shards = _cut(
    planned, itemsize=target_dtype.itemsize, max_bytes=max_shard_bytes
  )
  with model_dir.new_directory(output) as partial:
    directory = pathlib.Path(partial)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
      name = _shard_name(number, len(shards))
      tensors = {
        tensor.name: _value(reader, tensor, dtype=target_dtype)
        for tensor in shard
      }
      safetensors.numpy.save_file(
        tensors, directory / name, metadata={"format": "pt"}
      )
      index |= dict.fromkeys(tensors, name)
      progress(f"{name}: {len(tensors)} tensors")
    total = sum(_bytes(t, target_dtype.itemsize) for t in planned)
    if len(shards) > 1:
      tree = {"metadata": {"total_size": total}, "weight_map": index}
      _write_json(directory / "model.safetensors.index.json", tree)
    for name, text in texts.files.items():
      (directory / name).write_text(text, encoding="utf-8")
    _write_json(
      directory / "generation_config.json",
      {"_from_model_config": True, **texts.ids},
    )
    export_record.write(
      directory, export_record.Record(config=config, lineage=header.lineage)
    )
    # Last, as what marks a directory as a model.
    config_tree |= {"torch_dtype": target_dtype.name, **texts.ids}
    _write_json(directory / "config.json", config_tree)
  return Exported(
    architecture=family.architecture,
    num_tensors=len(planned),
    num_bytes=total,
    num_shards=len(shards),
  )


def measure(
  config: ModelConfig, *, dtype: str, max_shard_bytes: int = 2 * 10**9
) -> ExportSize:
  """What `export_model` would write of a model of that architecture.

  Args:
    config: the architecture.
    dtype: of the tensors.
    max_shard_bytes: as there.

  Returns:
    Its sizes.

  Raises:
    errors.UserError: where no stock class computes the same.
  """
  family, _ = families.write_config(config)
  planned, itemsize = _plan(family, config), jnp.dtype(dtype).itemsize
  shards = _cut(planned, itemsize=itemsize, max_bytes=max_shard_bytes)
  sizes = [sum(_bytes(one, itemsize) for one in shard) for shard in shards]
  return ExportSize(
    architecture=family.architecture,
    num_tensors=len(planned),
    num_bytes=sum(sizes),
    num_shards=len(shards),
    largest_shard=max(sizes),
  )


def _plan(family: Family, config: ModelConfig) -> list[_Planned]:
  """All tensors in the order of their names' layers, embedding first."""
  tensors = [
    _Planned(name=slot.tensor, shape=slot.shape, slot=slot)
    for slot in layout.slots(config, family.tensors)
  ]
  tensors += [
    _Planned(name=name, shape=idle.shape, slot=None, value=idle.value)
    for name, idle in families.idle_tensors(family, config).items()
  ]
  return sorted(tensors, key=lambda tensor: _natural(tensor.name))


def _natural(name: str) -> list[tuple[int, int | str]]:
  """Sorts numbers in a dotted name by value."""
  return [
    (0, int(part)) if part.isdecimal() else (1, part)
    for part in name.split(".")
  ]


def _cut(
  planned: list[_Planned], *, itemsize: int, max_bytes: int
) -> list[list[_Planned]]:
  shards: list[list[_Planned]] = [[]]
  size = 0
  for tensor in planned:
    own = _bytes(tensor, itemsize)
    if shards[-1] and size + own > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += own
  return shards


def _bytes(tensor: _Planned, itemsize: int) -> int:
  return int(np.prod(tensor.shape)) * itemsize


def _value(
  reader: array_store.TreeReader, tensor: _Planned, *, dtype: jnp.dtype
) -> np.ndarray:
  slot = tensor.slot
  if slot is None:
    return np.full(tensor.shape, tensor.value, dtype)
  value = slot.to_tensor(reader.read(slot.leaf, index=slot.index))
  with np.errstate(over="ignore"):  # looked for below
    cast = np.ascontiguousarray(value.astype(dtype, copy=False))
  if value.dtype != dtype:
    beyond = count_not_finite(cast) - count_not_finite(value)
    if beyond:
      raise errors.UserError(
        f"dtype={dtype.name}: {beyond} of {value.size} elements of"
        f" {tensor.name} are beyond its range; expected {value.dtype.name}"
      )
  return cast


def _shard_name(number: int, count: int) -> str:
  if count == 1:
    return "model.safetensors"
  return f"model-{number:05d}-of-{count:05d}.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
  files: dict[str, str]
  ids: dict[str, Any]  # bos_token_id, eos_token_id


def _text_files(
  header: model_dir.Header,
  tokenizer: str | None,
  *,
  end_of_text: str | None,
) -> _Texts:
  """The tokenizer's files, and the ids that begin and end a text."""
  stop = list(header.stop_tokens)
  files: dict[str, str] = {}
  first = header.begin_token
  settings: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": header.config.context_length,
    "clean_up_tokenization_spaces": False,
  }
  if tokenizer is not None:
    backend = Tokenizer.from_str(tokenizer)
    begins = backend.encode("").ids
    first = begins[0] if len(begins) == 1 else first
    if not stop and end_of_text is not None:
      stop = [backend.token_to_id(end_of_text)]
    files["tokenizer.json"] = tokenizer
    names = {"bos_token": first, "eos_token": stop[0] if stop else None}
    settings |= {
      name: backend.id_to_token(i) for name, i in names.items() if i is not None
    }
    files["tokenizer_config.json"] = json.dumps(settings, indent=2) + "\n"
  if header.chat_template is not None:
    files["chat_template.jinja"] = header.chat_template
  ids = {
    "bos_token_id": first,
    "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
  }
  return _Texts(files=files, ids=ids)


def _write_json(file: pathlib.Path, tree: Any) -> None:
  file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
