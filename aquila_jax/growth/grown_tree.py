"""A grown tree, read slice by slice; nothing of it is held.

Where the slices of the source come from (a MODEL on disk, arrays in memory) and
where those of the target go (a MODEL, devices of a mesh, a forward pass) is
others' business: the bytes are the same, since the same program makes them.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aquila_jax.core import processes
from aquila_jax.core.array_store import VOCAB_BLOCK
from aquila_jax.core.axes import LeafAxes
from aquila_jax.growth.axis_map import EMPTY, Powers
from aquila_jax.growth.growth import Growth, is_stacked

# An index of every dimension of a leaf; a `Tree` takes in one of them an array
# of indices as well.
Index = tuple[Any, ...]


@runtime_checkable
class Tree(Protocol):
  """Arrays by name, read slice by slice."""

  def read(self, name: str, *, index: Index = ()) -> np.ndarray:
    """leaf[index]; an array of indices in one dimension takes these."""
    ...


class ArrayTree:
  """A nested dict of arrays as a `Tree`.

  Args:
    tree: nested dicts of arrays, on the host or on devices.
  """

  def __init__(self, tree: Any):
    self._leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep=".")

  def read(self, name: str, *, index: Index = ()) -> np.ndarray:
    leaf = self._leaves[name]
    if isinstance(leaf, jax.Array) and _is_on_host(leaf):
      # A view: indexed by JAX, every slice would be a program to compile.
      leaf = np.asarray(leaf)
    return np.asarray(leaf[index])


def _is_on_host(leaf: jax.Array) -> bool:
  """Whether NumPy can look at it without a copy."""
  devices = leaf.devices()
  return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def leaf_name(path: Any) -> str:
  """A leaf's keys, joined by dots, as the stores on disk have them."""
  return ".".join(entry.key for entry in path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
  """A leaf of the target."""

  axes: LeafAxes
  shape: tuple[int, ...]
  dtype: np.dtype


def leaf_specs(axes: Any, shapes: Any) -> dict[str, LeafSpec]:
  """Every leaf of a model by name.

  Args:
    axes: the `LeafAxes` of every leaf.
    shapes: the same tree of shapes and dtypes.

  Returns:
    The leaves, in the order of the tree.
  """
  flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
  return {
    leaf_name(path): LeafSpec(
      axes=leaf_axes, shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype)
    )
    for (path, leaf), leaf_axes in zip(flat, jax.tree.leaves(axes), strict=True)
  }


def slices(spec: LeafSpec) -> Iterator[Index]:
  """The slices of a leaf: a layer of an expert, and blocks of the vocabulary.

  Together they fill the leaf. A slice is all that growth ever holds of it.
  """
  choices: list[list[int | slice]] = []
  for axis, size in zip(spec.axes.axes, spec.shape, strict=True):
    if is_stacked(axis):
      choices.append(list(range(size)))
    elif axis.name == "vocab":
      starts = range(0, size, VOCAB_BLOCK)
      choices.append([slice(i, min(i + VOCAB_BLOCK, size)) for i in starts])
    else:
      choices.append([slice(None)])
  return itertools.product(*choices)


def slice_shape(spec: LeafSpec, index: Index) -> tuple[int, ...]:
  """The shape of leaf[index], for one of its `slices`."""
  return tuple(
    len(range(*i.indices(size)))
    for i, size in zip(index, spec.shape, strict=True)
    if isinstance(i, slice)
  )


class Recent:
  """The slices that were read last; threads that want the same one share it.

  A layer of the source is read for every target layer that copies it, and once
  more as the one above the layer below; these follow each other.

  Args:
    tree: that is read.
  """

  _KEPT = 3

  def __init__(self, tree: Tree):
    self._tree = tree
    self._lock = threading.Lock()
    self._found: collections.OrderedDict[Any, Future[np.ndarray]]
    self._found = collections.OrderedDict()

  def read(self, name: str, *, index: Index) -> np.ndarray:
    key = (name, str(index))
    with self._lock:
      future, mine = self._found.get(key), key not in self._found
      if future is None:
        future = self._found[key] = Future()
      self._found.move_to_end(key)
      while len(self._found) > self._KEPT:
        self._found.popitem(last=False)
    if mine:
      try:
        future.set_result(self._tree.read(name, index=index))
      except BaseException as error:
        future.set_exception(error)
        raise
    return future.result()


class GrownTree:
  """A tree of the source, grown.

  Args:
    source: the tree that grows.
    growth: the maps.
    leaves: of the target, by name.
    powers: how the tree goes along with the parameters.
    seed: of what is drawn.
    prefix: of the names in the source.
  """

  def __init__(
    self,
    source: Tree,
    growth: Growth,
    *,
    leaves: Mapping[str, LeafSpec],
    powers: Powers,
    seed: int,
    prefix: str = "",
  ):
    self._source = source
    self._recent = Recent(source)
    self._growth = growth
    self._leaves = leaves
    self._powers = powers
    self._seed = seed
    self._prefix = prefix
    self._means: dict[str, np.ndarray] = {}

  def read(
    self, name: str, *, index: Index = (), out: np.ndarray | None = None
  ) -> np.ndarray:
    """One of the `slices` of a leaf, in the target's dtype; into `out`."""
    spec = self._leaves[name]
    place = dict(zip(spec.axes.names, index, strict=True))
    row: Any = place.get("layer", 0)
    layer = spec.axes.layer_of(row)
    copies = self._growth.layers.copies
    if self._growth.masked and not self._powers.draws and "layer" in place:
      if copies.is_new[layer]:  # it has had no gradients
        return np.zeros(slice_shape(spec, index), spec.dtype)
    own_row, row_above = row, row
    if "layer" in place:
      own_row, row_above = self._growth.source_rows(spec.axes, row)
    own = self._read(name, spec, index, row=own_row)
    above = own
    if row_above != own_row and self._growth.takes_next_layer(spec.axes):
      above = self._read(name, spec, index, row=row_above)
    return self._growth.slice(
      own,
      above,
      axes=spec.axes,
      powers=self._powers,
      rng=self._generator(name, spec, index),
      silent="layer" in place and bool(self._growth.layers.silent[layer]),
      dtype=spec.dtype,
      out=out,
    )

  def _read(
    self, name: str, spec: LeafSpec, index: Index, *, row: int
  ) -> np.ndarray:
    """The slice of the source that a slice of the target copies."""
    source = list(index)
    dim = spec.axes.index("layer")
    if dim is not None:
      source[dim] = row
    dim, vocab = spec.axes.index("vocab"), self._growth.vocab
    if dim is None or vocab is None:
      return self._recent.read(self._prefix + name, index=tuple(source))
    rows = vocab.source[source[dim]]
    source[dim] = np.maximum(rows, 0)
    values = self._source.read(self._prefix + name, index=tuple(source))
    empty = np.expand_dims(rows == EMPTY, tuple(range(1, values.ndim - dim)))
    if not empty.any():
      return values
    if not self._powers.draws:  # no gradients lie behind it
      return np.where(empty, np.zeros((), values.dtype), values)
    return np.where(empty, self._mean(name, spec, dim), values)

  def _mean(self, name: str, spec: LeafSpec, dim: int) -> np.ndarray:
    """The mean of the source's rows along `vocab`, with that dimension kept."""
    assert self._growth.vocab is not None
    if name not in self._means:
      size = self._growth.vocab.source_size
      total, dtype = np.zeros(()), np.dtype(float)
      for start in range(0, size, VOCAB_BLOCK):
        block = slice(start, min(start + VOCAB_BLOCK, size))
        at = [slice(None)] * len(spec.shape)
        at[dim] = block
        values = self._source.read(self._prefix + name, index=tuple(at))
        dtype = values.dtype
        total = total + np.sum(values, axis=dim, keepdims=True, dtype=float)
      self._means[name] = (total / size).astype(dtype)
    return self._means[name]

  def _generator(
    self, name: str, spec: LeafSpec, index: Index
  ) -> np.random.Generator:
    """Draws of a slice, independent of those of every other one."""
    place = [
      i if is_stacked(axis) else i.start or 0
      for axis, i in zip(spec.axes.axes, index, strict=True)
    ]
    # Nothing else is read of the name.
    leaf = zlib.crc32(name.encode())
    return np.random.default_rng((self._seed, leaf, *place))


def materialise(
  tree: Tree, leaves: Mapping[str, LeafSpec], *, shardings: Any = None
) -> Any:
  """All leaves of a tree as nested dicts of arrays.

  Args:
    tree: read slice by slice.
    leaves: what is to be read.
    shardings: where each leaf is to lie, by name; only a slice is then ever
      on the host. None leaves it to JAX.

  Returns:
    The arrays.
  """
  arrays = {
    name: _whole(tree, name, spec)
    if shardings is None
    else _sharded(tree, name, spec, shardings[name])
    for name, spec in leaves.items()
  }
  return traverse_util.unflatten_dict(arrays, sep=".")


def _whole(tree: Tree, name: str, spec: LeafSpec) -> jax.Array:
  filled = np.empty(spec.shape, spec.dtype)
  for index in slices(spec):
    filled[index] = tree.read(name, index=index)
  # jnp.asarray would compile a program for the shape.
  return jax.device_put(filled)


def _sharded(
  tree: Tree, name: str, spec: LeafSpec, sharding: jax.sharding.NamedSharding
) -> jax.Array:
  update = update_slice(sharding)
  filled = jnp.zeros(spec.shape, spec.dtype, device=sharding)
  for index in slices(spec):
    part = tree.read(name, index=index)
    # The slice lies over the mesh as the leaf does, so that no device gets
    # more than its share of it.
    stacked = [dim for dim, i in enumerate(index) if isinstance(i, int)]
    part = np.expand_dims(part, stacked)
    starts = [i if isinstance(i, int) else i.start or 0 for i in index]
    filled = update(filled, _placed(part, sharding), starts)
  return filled


def _placed(
  part: np.ndarray, sharding: jax.sharding.NamedSharding
) -> jax.Array:
  return processes.place(part, slice_sharding(part.shape, sharding))


def slice_sharding(
  shape: Sequence[int], sharding: jax.sharding.NamedSharding
) -> jax.sharding.NamedSharding:
  """Of a slice of a leaf on the mesh: split where its dimensions divide.

  Args:
    shape: of the slice, with as many dimensions as the leaf.
    sharding: of the leaf.

  Returns:
    Where the slice lies.
  """
  spec = []
  for size, entry in zip(shape, sharding.spec, strict=False):
    names = (entry,) if isinstance(entry, str) else entry or ()
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    spec.append(None if size % parts else entry)
  return jax.sharding.NamedSharding(
    sharding.mesh, jax.sharding.PartitionSpec(*spec)
  )


def update_slice(sharding: jax.sharding.NamedSharding) -> Any:
  """Jitted (leaf, slice, starts) -> the leaf with the slice in its place."""
  return jax.jit(
    jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=sharding
  )
