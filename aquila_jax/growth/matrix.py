"""A slice of a leaf as a matrix: what it reads by what it writes.

A leaf's dimensions are such that what it reads, or is indexed by, comes before
what it writes. So a slice of it is a matrix, and its index maps are one map of
rows and one of columns. It is filled a block of rows at a time: blocks stay in
the processor's caches, and the whole is passed over once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from aquila_jax.core.axes import Axis, Role
from aquila_jax.growth.axis_map import AxisMaps, Powers

_BLOCK_ELEMENTS = 2**18


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Side:
  """The rows or the columns of a leaf: one index map for its dimensions."""

  source: Int[np.ndarray, " target"]  # 0 where it copies nothing
  divisor: Float[np.ndarray, " target"]
  empty: Bool[np.ndarray, " target"]  # copies nothing
  zero: Bool[np.ndarray, " target"]  # and has zeros
  # Takes the values of the next layer.
  above: Bool[np.ndarray, " target"]
  shape: tuple[int, ...]  # of the target's dimensions

  @property
  def size(self) -> int:
    return len(self.source)

  @property
  def drawn(self) -> Bool[np.ndarray, " target"]:
    """Copies nothing, and has no zeros."""
    return self.empty & ~self.zero


def make_side(
  axes: tuple[Axis, ...],
  shape: tuple[int, ...],
  maps: AxisMaps,
  *,
  powers: Powers,
  from_next_layer: frozenset[str],
) -> Side:
  """One map out of those of several dimensions.

  Args:
    axes: of the dimensions.
    shape: of the source's.
    maps: by axis name; a dimension without one stays.
    powers: of the counts that are divided by.
    from_next_layer: written axes whose new indices take other values.

  Returns:
    The side.
  """
  source, divisor = np.zeros(1, int), np.ones(1)
  empty, zero, above = (np.zeros(1, bool) for _ in range(3))
  target = []
  for axis, size in zip(axes, shape, strict=True):
    g, writes = maps.get(axis.name), axis.role is Role.WRITES
    none = np.zeros(size, bool)
    places, divisors = np.arange(size), np.ones(size)
    is_empty, is_zero, is_above = none, none, none
    if g is not None and not g.is_identity:
      assert g.source_size == size, (axis, size)
      places = np.maximum(g.source, 0)
      divisors = g.divisors.astype(float) ** powers.of(axis.role)
      is_empty = g.is_empty
      is_zero = is_empty & (g.silent is axis.role)
      takes = writes and axis.name in from_next_layer
      is_above = g.is_new if takes else np.zeros(len(places), bool)
    target.append(len(places))
    source = np.add.outer(source * size, places).ravel()
    divisor = np.multiply.outer(divisor, divisors).ravel()
    empty = np.logical_or.outer(empty, is_empty).ravel()
    zero = np.logical_or.outer(zero, is_zero).ravel()
    above = np.logical_or.outer(above, is_above).ravel()
  return Side(
    source=source,
    divisor=divisor,
    empty=empty,
    zero=zero,
    above=above,
    shape=tuple(target),
  )


def blocks(size: int, *, width: int) -> Iterator[slice]:
  """Runs of rows of which a block is small."""
  step = max(1, _BLOCK_ELEMENTS // max(width, 1))
  for start in range(0, size, step):
    yield slice(start, min(start + step, size))


class Columns:
  """Copies columns of a block; whole runs at the speed of memory.

  Args:
    side: of the columns.
  """

  def __init__(self, side: Side):
    self._side = side
    follows = (np.diff(side.source) == 1) | side.empty[1:]
    same = (side.empty[1:] == side.empty[:-1]) & (np.diff(side.above) == 0)
    starts = np.flatnonzero(np.concatenate([[True], ~(follows & same)]))
    stops = np.append(starts[1:], side.size)
    self._runs = [
      (start, stop)
      for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
      if not side.empty[start]
    ]
    self._few = len(self._runs) <= max(16, side.size // 16)

  def copy(
    self,
    own: Shaped[np.ndarray, "rows source"],
    above: Shaped[np.ndarray, "rows source"],
    *,
    into: Shaped[np.ndarray, "rows target"],
  ) -> None:
    """Fills the columns of `into`; of those that copy nothing with anything."""
    side = self._side
    if not self._few:
      np.take(own, side.source, axis=1, out=into, mode="clip")
      if side.above.any():
        into[:, side.above] = above[:, side.source[side.above]]
      return
    for start, stop in self._runs:
      first = side.source[start]
      values = above if side.above[start] else own
      into[:, start:stop] = values[:, first : first + stop - start]

  @property
  def needs_above(self) -> bool:
    return bool(self._side.above.any())


def bits(values: np.ndarray) -> np.ndarray:
  """Of two-byte floats their bits, which NumPy copies faster."""
  return values.view(np.uint16) if values.dtype.itemsize == 2 else values


def divided(
  values: Shaped[np.ndarray, "rows columns"],
  rows: Float[np.ndarray, " rows"],
  *,
  wide: np.dtype,
  dtype: np.dtype,
) -> Shaped[np.ndarray, "rows columns"]:
  """Values / rows, computed in `wide`; not computed where all rows are 1."""
  if (rows != 1).any():
    values = values.astype(wide) / rows.astype(wide)[:, None]
  return values.astype(dtype, copy=False)
