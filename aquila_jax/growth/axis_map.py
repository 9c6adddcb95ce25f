"""The one primitive of growth: index maps on named axes.

A map g says of every target index of an axis which source index it copies;
C_k is how many target indices copy k. For y = x W, W [in, out]:

  W writes the axis (out)   copy              W'[:, j] = W[:, g(j)]
  W reads the axis (in)     copy and divide   W'[i, :] = W[g(i), :] / C_g(i)
  neither (a table, layers) copy

With one map for each axis name of the whole network, x' = x[g] everywhere, and
every product is what it was: sum_i x'[i] W'[i, j] = sum_k x[k] W[k, g(j)]. That
is FPI (bert2BERT, arXiv 2110.07143, section 3.2); every other method changes
which maps are used, or whose values a map takes.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import dtypes
from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.lineage import copy_runs


@dataclasses.dataclass(frozen=True, eq=False)
class AxisMap:
  """g: for every target index of one axis, the source index it copies."""

  source: Int[np.ndarray, " target"]
  source_size: int

  def __post_init__(self):
    inside = (self.source >= 0) & (self.source < self.source_size)
    assert inside.all(), "a target index copies what is not there"

  @functools.cached_property
  def counts(self) -> Int[np.ndarray, " source"]:
    """C: how many target indices copy each source index."""
    return np.bincount(self.source, minlength=self.source_size)

  @property
  def divisors(self) -> Int[np.ndarray, " target"]:
    """C_g(i) of every target index i."""
    return self.counts[self.source]

  @property
  def uses_all(self) -> bool:
    """Whether every source index is copied somewhere."""
    return bool((self.counts > 0).all())

  @functools.cached_property
  def is_new(self) -> Bool[np.ndarray, " target"]:
    """False for the first copy of every source index, True for the others."""
    new = np.ones(len(self.source), bool)
    new[np.unique(self.source, return_index=True)[1]] = False
    return new

  @property
  def new_ranges(self) -> list[list[int]]:
    """The new indices as half-open ranges, for lineage.Event.new_indices."""
    edges = np.flatnonzero(np.diff([0, *self.is_new.astype(int), 0]))
    return edges.reshape(-1, 2).tolist()


AxisMaps = Mapping[str, AxisMap]


def copies(maps: AxisMaps) -> dict[str, list[list[int]]]:
  """The maps by axis name in runs, for lineage.Event.copies."""
  return {name: copy_runs(m.source, m.divisors) for name, m in maps.items()}


def circular(source_size: int, target_size: int) -> AxisMap:
  """g(i) = i mod source_size; equal counts at an integer factor."""
  return AxisMap(np.arange(target_size) % source_size, source_size)


def random(
  source_size: int, target_size: int, *, name: str, seed: int
) -> AxisMap:
  """The source first, then indices drawn evenly from it (bert2BERT, eq. 3).

  Args:
    source_size: of the axis.
    target_size: of the axis.
    name: of the axis; a part of the seed, as in no two axes the same draw.
    seed: of the growth.

  Returns:
    The map.
  """
  generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
  drawn = generator.integers(0, source_size, target_size - source_size)
  return AxisMap(np.concatenate([np.arange(source_size), drawn]), source_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
  """The power of the counts that a tree is divided by, along axes of a role."""

  reads: int
  writes: int

  def of(self, role: Role) -> int:
    return {Role.READS: self.reads, Role.WRITES: self.writes}.get(role, 0)


# Adam's moments have powers of their own: optimizer_state.py.
PARAMETERS = Powers(reads=1, writes=0)


def map_axes(
  leaf: Float[Array, "*source"],
  axes: LeafAxes,
  maps: AxisMaps,
  *,
  powers: Powers = PARAMETERS,
) -> Float[Array, "*target"]:
  """Copies a leaf along every axis that has a map, and divides by the counts.

  Args:
    leaf: a parameter, or anything that is shaped as one.
    axes: its declared axes.
    maps: by axis name; an axis without one stays.
    powers: of the counts; by default those of a parameter.

  Returns:
    The grown leaf, computed in at least float32, in the dtype of `leaf`.
  """
  # At least float32: a division in bfloat16 would round every copy.
  grown = leaf.astype(dtypes.at_least_float32(leaf.dtype))
  for dim, axis in enumerate(axes.axes):
    if axis.name not in maps:
      continue
    axis_map = maps[axis.name]
    assert leaf.shape[dim] == axis_map.source_size, (axis, leaf.shape)
    grown = jnp.take(grown, jnp.asarray(axis_map.source), axis=dim)
    power = powers.of(axis.role)
    if power:
      divisors = along(dim, axis_map.divisors**power, rank=leaf.ndim)
      grown = grown / jnp.asarray(divisors, grown.dtype)
  return grown.astype(leaf.dtype)


def along(dim: int, vector: np.ndarray, *, rank: int) -> np.ndarray:
  """`vector` as an array of `rank` dimensions that varies along `dim` only."""
  return vector.reshape([-1 if d == dim else 1 for d in range(rank)])


def axis_sizes(axes: object, shapes: object) -> dict[str, int]:
  """The size of every axis name that a tree of leaves declares.

  Args:
    axes: the `LeafAxes` of every leaf.
    shapes: the same tree of anything with a `shape`.

  Returns:
    Size by axis name. One name has one size in a whole network.
  """
  sizes: dict[str, int] = {}
  for leaf_axes, leaf in zip(
    jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True
  ):
    for name, size in zip(leaf_axes.names, leaf.shape, strict=True):
      assert sizes.setdefault(name, size) == size, name
  return sizes
