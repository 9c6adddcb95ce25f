"""Trees of arrays on disk: one zarr3 directory a leaf, chunked by layer.

The layout is Orbax's (`use_ocdbt=False, use_zarr3=True`): Orbax restores what
this writes, and TensorStore alone reads or writes any slice of it. Every chunk
carries a CRC-32C, which Orbax itself does not verify: a flipped bit is an error
that names the leaf, not a silently different model.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding

from aquila_jax.core import errors, processes
from aquila_jax.core.axes import LeafAxes

_CHUNK_BYTES = 256 * 2**20  # no chunk is larger, whatever the leaf
# Rows of a table, or columns of a head, that growth has in memory at a time;
# chunks end where these do, so that none is written twice.
VOCAB_BLOCK = 8192
_DICT_KEY = 2  # Orbax's code of a dict key in _METADATA


def chunk_shape(
  shape: Sequence[int], axes: LeafAxes, *, itemsize: int
) -> tuple[int, ...]:
  """One layer (of one expert), 8,192 of `vocab`, and at most 256 MiB."""
  chunk = []
  for n, axis in zip(shape, axes.axes, strict=True):
    if axis.name in ("layer", "expert") and axis.role.value == "neither":
      chunk.append(1)
    else:
      chunk.append(min(n, VOCAB_BLOCK) if axis.name == "vocab" else n)
  for dim in range(len(chunk)):
    while chunk[dim] > 1 and math.prod(chunk) * itemsize > _CHUNK_BYTES:
      chunk[dim] = -(-chunk[dim] // 2)
  return tuple(chunk)


class TreeWriter:
  """Writes a tree of arrays leaf by leaf, or slice by slice of a leaf.

  Nothing is kept in memory. Threads may write at the same time, each its own
  slice. `close` refuses a tree that is not complete.

  Args:
    directory: made here; it must not exist.
    like: nested dicts with string keys, of anything with `shape` and `dtype`.
    axes: the `LeafAxes` of every leaf; decides the chunks.
  """

  def __init__(self, directory: epath.Path, like: Any, *, axes: Any):
    directory.mkdir(parents=True)
    self._directory = directory
    self._lock = threading.Lock()
    self._leaves = _named_leaves(like)
    leaf_axes = dict(_named_leaves(axes))
    self._stores = {}
    self._missing = {}
    for keys, leaf in self._leaves:
      dtype = jnp.dtype(leaf.dtype)
      chunk = chunk_shape(leaf.shape, leaf_axes[keys], itemsize=dtype.itemsize)
      metadata = _zarr_metadata(leaf.shape, dtype, chunk)
      self._stores[".".join(keys)] = ts.open(
        _spec(directory, keys) | {"metadata": metadata}, create=True
      ).result()
      self._missing[".".join(keys)] = math.prod(leaf.shape)

  def write(
    self, name: str, value: Any, *, index: tuple[int | slice, ...] = ()
  ) -> None:
    """Writes leaf[index] = value.

    Args:
      name: the keys of the leaf, joined by dots.
      value: of the leaf's dtype, and of the shape of leaf[index].
      index: of the leading dimensions; none is the whole leaf.
    """
    store, value = self._stores[name], np.asarray(value)
    store = store[index] if index else store
    assert value.dtype == store.dtype.numpy_dtype, (name, value.dtype)
    assert value.shape == store.shape, (name, value.shape)
    store.write(value).result()
    with self._lock:
      self._missing[name] -= value.size

  def close(self) -> None:
    """Writes Orbax's metadata; every element must have been written once."""
    wrong = {name: n for name, n in self._missing.items() if n}
    assert not wrong, f"elements not written, or written twice: {wrong}"
    metadata = json.dumps(_orbax_metadata(self._leaves))
    (self._directory / "_METADATA").write_text(metadata)


def write_tree(directory: epath.Path, tree: Any, *, axes: Any) -> None:
  """Writes every leaf of a nested dict of arrays, then Orbax's metadata.

  Of several processes all call it, and the first writes: a leaf that is spread
  over them is gathered, and if it is large, a chunk at a time.

  Args:
    directory: made here; it must not exist.
    tree: nested dicts with string keys and array leaves.
    axes: the `LeafAxes` of every leaf; decides the chunks.
  """
  writer = None
  if processes.is_first():
    writer = TreeWriter(directory, tree, axes=axes)
  leaf_axes = dict(_named_leaves(axes))
  for keys, leaf in _named_leaves(tree):
    for index in _pieces(leaf, leaf_axes[keys]):
      piece = processes.fetch(leaf, index=index)
      if writer is not None:
        writer.write(".".join(keys), piece, index=index)
  if writer is not None:
    writer.close()


def _pieces(leaf: Any, axes: LeafAxes) -> list[tuple[int, ...]]:
  """Indices of the leading dimensions, so that what is gathered is small."""
  shape = np.shape(leaf)
  itemsize = jnp.dtype(leaf.dtype).itemsize
  if not processes.is_spread(leaf):
    return [()]
  cut = 0  # leading dimensions of which a chunk has one index
  for size in chunk_shape(shape, axes, itemsize=itemsize):
    if size > 1 or math.prod(shape[cut:]) * itemsize <= _CHUNK_BYTES:
      break
    cut += 1
  return list(np.ndindex(*shape[:cut]))


class TreeReader:
  """Reads a tree of arrays leaf by leaf, or slice by slice of a leaf.

  Args:
    directory: of `write_tree`, or an Orbax checkpoint of that layout.
    like: nested dicts of anything with `shape` and `dtype`.

  Raises:
    errors.UserError: on a leaf that is missing, left over, or of another shape
      or dtype; it names the leaf.
  """

  def __init__(self, directory: epath.Path, like: Any):
    if not directory.is_dir():
      raise errors.UserError(f"{directory} is missing; this MODEL is not whole")
    wanted = dict(_named_leaves(like))
    stored = {
      child.name
      for child in directory.iterdir()
      if (child / "zarr.json").exists()
    }
    for name in sorted(stored - {".".join(keys) for keys in wanted}):
      raise errors.UserError(f"{directory}: leaf {name!r} is not of this model")
    self._directory = directory
    self._stores = {}
    for keys, leaf in wanted.items():
      name = ".".join(keys)
      if name not in stored:
        raise errors.UserError(f"{directory}: leaf {name!r} is missing")
      try:
        store = ts.open(_spec(directory, keys), open=True).result()
      except ValueError as error:
        raise _damaged(directory, name, error) from error
      found = (tuple(store.shape), store.dtype.numpy_dtype)
      needed = (tuple(leaf.shape), jnp.dtype(leaf.dtype))
      if found != needed:
        raise errors.UserError(
          f"{directory}: leaf {name!r} is {found[1]}{list(found[0])}, the"
          f" configuration needs {needed[1]}{list(needed[0])}"
        )
      self._stores[name] = store

  def start(self, name: str, *, index: tuple[Any, ...] = ()) -> Any:
    """Begins to read leaf[index]; `finish` waits for it."""
    store = self._stores[name]
    return (store[index] if index else store).read()

  def finish(self, name: str, read: Any) -> np.ndarray:
    """What `start` began.

    Raises:
      errors.UserError: where its bytes fail their checksum.
    """
    try:
      return np.asarray(read.result())
    except ValueError as error:
      raise _damaged(self._directory, name, error) from error

  def read(self, name: str, *, index: tuple[Any, ...] = ()) -> np.ndarray:
    """leaf[index].

    Args:
      name: the keys of the leaf, joined by dots.
      index: of the leading dimensions, each a number, a slice, or (one of
        them) an array of numbers; none is the whole leaf.

    Returns:
      The array.

    Raises:
      errors.UserError: where its bytes fail their checksum.
    """
    return self.finish(name, self.start(name, index=index))


def read_tree(directory: epath.Path, like: Any) -> Any:
  """Reads the leaves that `like` names.

  Args:
    directory: of `write_tree`, or an Orbax checkpoint of that layout.
    like: nested dicts of anything with `shape` and `dtype`. A leaf with a
      NamedSharding is read in the parts that devices have, and goes there.

  Returns:
    The arrays, in the structure of `like`.

  Raises:
    errors.UserError: on a leaf that is missing, left over, of another shape or
      dtype, or whose bytes fail their checksum; it names the leaf.
  """
  reader = TreeReader(directory, like)
  leaves = dict(_named_leaves(like))
  spread = {
    k: leaf
    for k, leaf in leaves.items()
    if isinstance(getattr(leaf, "sharding", None), NamedSharding)
  }
  reads = {k: reader.start(".".join(k)) for k in leaves if k not in spread}
  return traverse_util.unflatten_dict(
    {
      # jnp.asarray would compile a program for each shape.
      k: jax.device_put(reader.finish(".".join(k), reads[k]))
      if k in reads
      else jax.make_array_from_callback(
        leaf.shape,
        leaf.sharding,
        functools.partial(_read_part, reader, ".".join(k)),
      )
      for k, leaf in leaves.items()
    }
  )


def _read_part(reader: TreeReader, name: str, index: Any) -> np.ndarray:
  return reader.read(name, index=index)


def _damaged(
  directory: epath.Path, name: str, error: Exception
) -> errors.UserError:
  reason = str(error).splitlines()[0][:160]
  return errors.UserError(f"{directory}: leaf {name!r} is damaged: {reason}")


def _named_leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(tuple(entry.key for entry in path), leaf) for path, leaf in flat]


def _spec(directory: epath.Path, keys: Sequence[str]) -> dict[str, Any]:
  path = directory / ".".join(keys)
  return {
    "driver": "zarr3",
    "kvstore": _kvstore(path),
    # A chunk of zeros is written too, so that a missing one is an error and
    # not zeros.
    "store_data_equal_to_fill_value": True,
    "fill_missing_data_reads": False,
  }


def _kvstore(path: epath.Path) -> dict[str, str]:
  text = str(path)
  if text.startswith("gs://"):
    bucket, _, key = text.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": key + "/"}
  return {"driver": "file", "path": str(path.resolve()) + "/"}


def _zarr_metadata(
  shape: Sequence[int], dtype: np.dtype, chunk: Sequence[int]
) -> dict[str, Any]:
  return {
    "shape": list(shape),
    "data_type": dtype.name,
    "chunk_grid": {
      "name": "regular",
      "configuration": {"chunk_shape": list(chunk)},
    },
    # Weights do not compress; the checksum is all that the codec adds.
    "codecs": [
      {"name": "bytes", "configuration": {"endian": "little"}},
      {"name": "crc32c"},
    ],
  }


def _orbax_metadata(
  leaves: list[tuple[tuple[str, ...], Any]],
) -> dict[str, Any]:
  return {
    "tree_metadata": {
      str(keys): {
        "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
        "value_metadata": {
          "value_type": "np.ndarray",
          "skip_deserialize": False,
          "write_shape": list(leaf.shape),
        },
      }
      for keys, leaf in leaves
    },
    "use_ocdbt": False,
    "use_zarr3": True,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
  }
