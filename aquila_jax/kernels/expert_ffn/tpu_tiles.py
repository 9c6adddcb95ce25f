"""What a TPU kernel is compiled for, and the tiles that fit its memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl

from aquila_jax.kernels.target import num_cores

LANES = 128
_MIB = 2**20
# Of the vector memory of a core, by the kind of device; others have 16 MiB.
_MEMORY = {
  "TPU v5 lite": 128 * _MIB,
  "TPU v5e": 128 * _MIB,
  "TPU v5": 64 * _MIB,
  "TPU v5p": 64 * _MIB,
  "TPU v6 lite": 128 * _MIB,
  "TPU v6e": 128 * _MIB,
  "TPU7x": 64 * _MIB,
}
_LEAST_MEMORY = 16 * _MIB
# Rows and columns of what a matrix unit holds of the right factor; others' are
# as many as lanes.
_PRODUCT = {"TPU v6 lite": 256, "TPU v6e": 256, "TPU7x": 256}


def vector_memory(device_kind: str) -> int:
  """Bytes of a core; of kinds that are not known, what all have at least."""
  return _MEMORY.get(device_kind, _LEAST_MEMORY)


def planned(memory: int) -> int:
  """Of a core's bytes, those that tiles, which are an estimate, may take."""
  return memory * 3 // 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What a kernel is compiled for."""

  num_cores: int  # of one device of JAX
  memory: int  # bytes of a core
  product: int  # rows and columns of a factor that a matrix unit holds
  rows: int  # of a tile
  outer_rows: int  # of a tile, in the gradients of kernels
  deep_rows: int  # of a tile, where a step takes a part of what is summed over
  interpret: bool

  @classmethod
  def of(cls, device_kind: str, **fields: Any) -> Chip:
    """A kind of device; others than those named have 16 MiB and one core."""
    return cls(
      num_cores=num_cores(device_kind),
      memory=vector_memory(device_kind),
      product=_PRODUCT.get(device_kind, LANES),
      **fields,
    )

  def filled_up(self, length: int) -> int:
    """What a matrix unit takes for an axis of that length."""
    return pl.cdiv(length, self.product) * self.product

  @property
  def budget(self) -> int:
    """Bytes that are planned with: what tiles hold is an estimate."""
    return planned(self.memory)


def _sizes(length: int) -> list[int]:
  """Tiles of an axis, largest first: all of it, or parts of whole lanes."""
  parts = range(2, pl.cdiv(length, LANES) + 1)
  cut = (pl.cdiv(pl.cdiv(length, part), LANES) * LANES for part in parts)
  return [length, *sorted({size for size in cut if size < length})[::-1]]


def tile_of_columns(
  length: int, held: Callable[[int], int], *, chip: Chip
) -> int:
  """The tile with which the fewest steps and the least padding are taken.

  Cores share the tiles.
  """
  found = []
  for size in _sizes(length):
    if held(size) <= chip.budget:
      of_core = pl.cdiv(pl.cdiv(length, size), chip.num_cores)
      found.append((of_core * chip.filled_up(size), of_core, size))
  return min(found)[2] if found else _sizes(length)[-1]


def tiles_of_both(
  depth: int, width: int, held: Callable[[int, int], int], *, chip: Chip
) -> tuple[tuple[int, int], tuple[int, int]]:
  """Of two axes, the pair with which the least is computed, then read.

  And the axes' order in the grid: cores share the first one's tiles.
  """
  found = []
  for rows in _sizes(depth):
    for columns in _sizes(width):
      if held(rows, columns) > chip.budget:
        continue
      tiles = pl.cdiv(depth, rows), pl.cdiv(width, columns)
      read = depth * tiles[1] + width * tiles[0]
      one = rows * chip.filled_up(columns)
      for order in ((0, 1), (1, 0)):
        of_core = pl.cdiv(tiles[order[0]], chip.num_cores) * tiles[order[1]]
        found.append((of_core * one, read, (rows, columns), order))
  if not found:
    return (_sizes(depth)[-1], _sizes(width)[-1]), (0, 1)
  return min(found)[2:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deep:
  """Tiles of a product of rows over K, in steps over parts of K."""

  rows: int  # of a tile
  part_rows: int  # that are left out of it together, where they are others'
  depth: int  # of a step; divides K
  columns: int
  moved: int  # numbers, of the product

  @classmethod
  def of(
    cls,
    *,
    num_rows: int,
    depth: int,
    width: int,
    num_experts: int,
    num_products: int,
    itemsize: int,
    chip: Chip,
  ) -> Deep | None:
    """The one that computes least, then moves least, then has the fewest steps.

    Args:
      num_rows: R.
      depth: K.
      width: N.
      num_experts: E.
      num_products: that are added.
      itemsize: of a number.
      chip: what it is compiled for.

    Returns:
      The tiles; None where K has no parts of whole lanes, or none fit.
    """
    rows = min(chip.deep_rows, num_rows)
    depths = [
      size for size in range(LANES, depth + 1, LANES) if depth % size == 0
    ]
    steps = pl.cdiv(num_rows, rows) + num_experts
    found = []
    for columns, size in itertools.product(_sizes(width), depths):
      num_tiles = pl.cdiv(width, columns)
      moved = rows * size * num_products + size * columns * num_products
      moved += rows * columns
      held = 2 * itemsize * moved + 2 * 4 * rows * columns
      if held > chip.budget or num_tiles % chip.num_cores:
        continue
      in_all = num_tiles * num_rows * depth * num_products
      in_all += steps * depth * width * num_products + num_rows * width
      computed = num_tiles * chip.filled_up(columns)
      computed *= depth // size * chip.filled_up(size)
      found.append((computed, in_all, -size, columns))
    if not found:
      return None
    _, in_all, size, columns = min(found)
    part_rows = chip.rows if rows % chip.rows == 0 else rows
    return cls(
      rows=rows,
      part_rows=part_rows,
      depth=-size,
      columns=columns,
      moved=in_all,
    )
