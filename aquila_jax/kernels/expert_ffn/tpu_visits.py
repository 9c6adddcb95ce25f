"""Which rows of which expert each step of a TPU kernel's grid takes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visits:
  """Steps over tiles of rows: a tile once for each expert that has rows in it.

  Tiles ascend and so do experts. There are S = T + E steps, of T tiles and E
  experts; those that are not needed repeat the last one, without rows.
  """

  tile: Int[Array, "S"]
  expert: Int[Array, "S"]
  first: Int[Array, "S"]  # the rows of the tile that are taken
  end: Int[Array, "S"]  # before this one; none are where it equals `first`
  tile_rows: int

  @classmethod
  def of_rows(
    cls,
    group_rows: Int[Array, "E"],
    *,
    num_rows: int,
    tile_rows: int,
    empty_experts: bool,
  ) -> Visits:
    """Of groups of rows that lie one behind the other.

    Args:
      group_rows: how many rows each expert has.
      num_rows: of the array; at least their sum.
      tile_rows: of a tile.
      empty_experts: experts without rows have a step too; otherwise tiles
        without rows have one, in the name of the last expert.

    Returns:
      The steps.
    """
    num_experts, num_tiles = group_rows.shape[0], pl.cdiv(num_rows, tile_rows)
    end_row = jnp.cumsum(group_rows, dtype=jnp.int32)
    first_row = end_row - group_rows
    has_rows = group_rows > 0
    first_tile = first_row // tile_rows
    last_tile = jnp.where(has_rows, (end_row - 1) // tile_rows, first_tile)
    steps = last_tile - first_tile + 1
    if not empty_experts:
      steps = jnp.where(has_rows, steps, 0)
    behind = jnp.cumsum(steps, dtype=jnp.int32)
    step = jnp.arange(num_tiles + num_experts, dtype=jnp.int32)
    group = jnp.searchsorted(behind, step, side="right").astype(jnp.int32)
    expert = jnp.minimum(group, num_experts - 1)
    # An expert's kernels are not fetched for nothing.
    if not empty_experts:
      numbers = jnp.arange(num_experts, dtype=jnp.int32)
      used = jax.lax.cummax(jnp.where(has_rows, numbers, 0))
      expert = used[expert]
    tile = first_tile[expert] + step - (behind - steps)[expert]
    # Behind the last group: the tiles that are left, once each.
    is_left = group >= num_experts
    most = last_tile[-1] if empty_experts else num_tiles - 1
    used_tiles = -(-end_row[-1] // tile_rows)
    tile = jnp.where(is_left, used_tiles + step - behind[-1], tile)
    tile = jnp.clip(tile, 0, jnp.minimum(most, num_tiles - 1))
    start = tile * tile_rows
    first = jnp.clip(first_row[expert] - start, 0, tile_rows)
    end = jnp.clip(end_row[expert] - start, first, tile_rows)
    return cls(
      tile=tile,
      expert=expert,
      first=jnp.where(is_left, 0, first),
      end=jnp.where(is_left, 0, end),
      tile_rows=tile_rows,
    )

  @property
  def arrays(self) -> tuple[jax.Array, ...]:
    """What kernels prefetch."""
    return self.tile, self.expert, self.first, self.end
