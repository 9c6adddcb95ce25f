"""How tokens are cut for the cores of a TPU; and what its calls share."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int, Shaped

from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES
from aquila_jax.kernels.topk_routing.rule import RoutingRule
from aquila_jax.kernels.topk_routing.tuning import Blocks


def up(size: int, multiple: int) -> int:
  """The least multiple that is not below `size`."""
  return -(-size // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelShape:
  """What every kernel is compiled for."""

  rule: RoutingRule
  num_experts: int
  has_valid: bool

  @property
  def num_tiles(self) -> int:
    """Vectors that the experts of a token fill, or tiles of eight experts."""
    return -(-self.num_experts // SUBLANES)

  @property
  def slots(self) -> int:
    """The chosen experts of a token, rounded up to whole vectors."""
    return up(self.rule.top_k, SUBLANES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """How B rows of T tokens are cut into tiles, and tiles dealt to cores.

  A core has its tiles in order, since positions count what came before. A piece
  is a run of tiles of one core and one row: what counts and sums are given of.
  """

  row_tokens: int  # T
  num_rows: int  # B
  blocks: Blocks
  num_cores: int

  @classmethod
  def of(
    cls,
    row_tokens: int,
    num_rows: int,
    *,
    blocks: Blocks,
    num_cores: int,
    unit: int = LANES,
  ) -> Grid:
    """Tiles of whole units, as large as `blocks` says or as fit a row."""
    whole = up(row_tokens, unit)
    of_core = up(-(-row_tokens * num_rows // num_cores), unit)
    tile = min(up(blocks.tokens, unit), whole, of_core)
    if num_rows > 1 or unit > LANES:
      while whole % tile:
        tile -= unit
    grid = cls(
      row_tokens=row_tokens,
      num_rows=num_rows,
      blocks=blocks.cut(tile),
      num_cores=1,
    )
    if grid.steps % num_cores == 0:
      grid = dataclasses.replace(grid, num_cores=num_cores)
    return grid

  @property
  def tiles_per_row(self) -> int:
    """The last one of a single row may be cut off."""
    return -(-self.row_tokens // self.blocks.tokens)

  @property
  def steps(self) -> int:
    """Tiles of a core."""
    return self.num_rows * self.tiles_per_row // self.num_cores

  @property
  def steps_per_piece(self) -> int:
    """Tiles of a piece."""
    return math.gcd(self.steps, self.tiles_per_row)

  @property
  def num_pieces(self) -> int:
    """Of all cores."""
    return self.num_cores * self.steps // self.steps_per_piece

  @property
  def is_ragged(self) -> bool:
    """Whether tiles have lanes without a token."""
    return self.row_tokens % self.blocks.tokens != 0

  def tile(self, core, step):
    """The number of a core's tile."""
    return core * self.steps + step

  def piece(self, core, step):
    """The number of the piece that a core's tile is of."""
    return jax.lax.div(self.tile(core, step), self.steps_per_piece)

  def assignments(
    self, so_far: Int[Array, "pieces E"]
  ) -> tuple[Int[Array, "cores E"], Int[Array, "B E"]]:
    """Of what a core has placed up to the end of each piece of its own.

    Args:
      so_far: assignments to every expert.

    Returns:
      What the cores before each core have placed, and what each row has.
    """
    of_core = so_far.reshape(self.num_cores, -1, so_far.shape[-1])
    before = jnp.cumsum(of_core[:, -1], axis=0) - of_core[:, -1]
    of_piece = jnp.diff(of_core, axis=1, prepend=0)
    return before, self.by_row(of_piece.reshape(so_far.shape))

  def padded(self, x: Shaped[Array, "N M"]) -> Shaped[Array, "N padded"]:
    """With rows of tokens as long as their tiles; a single row as it is."""
    if self.num_rows == 1 or not self.is_ragged:
      return x
    rows = x.reshape(len(x), self.num_rows, self.row_tokens)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, self._missing))).reshape(
      len(x), -1
    )

  def tokens(self, x: Shaped[Array, "N padded"]) -> Shaped[Array, "N M"]:
    """The inverse of `padded`."""
    if self.num_rows == 1 or not self.is_ragged:
      return x
    rows = x.reshape(len(x), self.num_rows, -1)
    return rows[:, :, : self.row_tokens].reshape(len(x), -1)

  def valid(self, valid: Bool[Array, "M"] | None) -> Int[Array, "1 padded"]:
    """1 for tokens that are no padding, in whole tiles."""
    if valid is None:
      valid = jnp.ones(self.num_rows * self.row_tokens, bool)
    rows = valid.reshape(self.num_rows, self.row_tokens).astype(jnp.int32)
    return jnp.pad(rows, ((0, 0), (0, self._missing))).reshape(1, -1)

  @property
  def _missing(self) -> int:
    return self.tiles_per_row * self.blocks.tokens - self.row_tokens

  def by_row(self, pieces: jax.Array) -> jax.Array:
    """Sums over a row's pieces: [pieces E] -> [B E]."""
    return pieces.reshape(self.num_rows, -1, pieces.shape[-1]).sum(
      axis=1, dtype=pieces.dtype
    )


def like(x: jax.Array, shape, dtype) -> jax.ShapeDtypeStruct:
  """An output that varies over the mesh axes that `x` varies over."""
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def cost(logits: jax.Array, *, passes: int) -> pl.CostEstimate:
  """For the compiler, which can't look into a kernel; what tokens have more."""
  return pl.CostEstimate(
    flops=20 * passes * logits.size,
    transcendentals=passes * logits.size,
    bytes_accessed=2 * passes * logits.size * logits.dtype.itemsize,
  )
