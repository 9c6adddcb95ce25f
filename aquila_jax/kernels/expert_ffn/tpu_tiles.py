"""What a TPU kernel is compiled for, and the tiles that fit its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

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
  rows: int  # of a tile
  outer_rows: int  # of a tile, in the gradients of kernels
  interpret: bool

  @classmethod
  def of(cls, device_kind: str, **fields: Any) -> Chip:
    """A kind of device; others than those named have 16 MiB and one core."""
    return cls(
      num_cores=num_cores(device_kind),
      memory=vector_memory(device_kind),
      **fields,
    )

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
      found.append((of_core * pl.cdiv(size, LANES) * LANES, of_core, size))
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
      one = rows * pl.cdiv(columns, LANES) * LANES
      for order in ((0, 1), (1, 0)):
        of_core = pl.cdiv(tiles[order[0]], chip.num_cores) * tiles[order[1]]
        found.append((of_core * one, read, (rows, columns), order))
  if not found:
    return (_sizes(depth)[-1], _sizes(width)[-1]), (0, 1)
  return min(found)[2:]


def with_rows_that_fit(chip: Chip, gate: Float[Array, "E D F"]) -> Chip:
  """Tiles halved, while two hidden gradients leave little of the budget.

  For the rows' gradients both are held whole, of this tile and the next.
  """
  rows, row_bytes = chip.rows, 2 * 2 * gate.shape[2] * gate.dtype.itemsize
  while rows > LANES and rows * row_bytes > chip.budget * 3 // 4:
    rows //= 2
  return dataclasses.replace(chip, rows=rows)
