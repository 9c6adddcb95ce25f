"""A Pallas kernel over groups of rows on a TPU: products, and outer products.

`by_rows` is for what rows and the kernels of their expert make, `deep` for what
they make over more than a core holds, `outer` for the gradients of these
kernels. pallas_tpu.py says what is computed in a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from aquila_jax.kernels.expert_ffn.tpu_tiles import (
  LANES,
  Chip,
  Deep,
  tile_of_columns,
  tiles_of_both,
)
from aquila_jax.kernels.expert_ffn.tpu_visits import Visits


def dot(a, b, *, contract: tuple[int, int] = (1, 0)):
  """A b in float32, over these axes."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
  """What a kernel over rows has of a tile of them in a step, and makes."""

  whole: Sequence[jax.Array]  # [R, K]: all columns
  tiled: Sequence[jax.Array] = ()  # [R, N]: a tile of columns
  # Of the rows' expert, each with the axis of length N that is in tiles.
  kernels: Sequence[tuple[jax.Array, int]]
  num_outputs: int  # [R, N]: a tile of columns
  # [R, K] of these widths, before the others: all columns. They need all N at
  # once, so that there can be but one tile.
  whole_outputs: Sequence[int] = ()
  # Behind the others, of every tile of columns 128 float32 sums of a row.
  has_sums: bool = False

  @property
  def width(self) -> int:
    """N."""
    kernel, axis = self.kernels[0]
    return kernel.shape[axis]

  @property
  def weights(self) -> int:
    """Numbers of an expert's kernels beside one of N."""
    return sum(k.size // k.shape[0] // self.width for k, _ in self.kernels)

  def output_widths(self, columns: int) -> list[int]:
    """What a step makes of each output."""
    return [*self.whole_outputs, *[columns] * self.num_outputs]

  def held(self, columns: int, *, tile_rows: int) -> int:
    """Bytes: what comes or goes twice, and products in float32."""
    size = self.whole[0].dtype.itemsize
    made = sum(self.output_widths(columns))
    tiled = len(self.tiled) * columns
    depth = sum(x.shape[1] for x in self.whole)
    moved = tile_rows * (depth + tiled + made) + self.weights * columns
    products = tile_rows * (
      len(self.kernels) * max([columns, *self.whole_outputs]) + tiled + made
    )
    sums = 3 * 4 * tile_rows * LANES if self.has_sums else 0
    return 2 * size * moved + 4 * products + size * tile_rows * made + sums

  def rows_that_fit(self, chip: Chip) -> int:
    """Of a tile, halved while not even the fewest columns fit beside it."""
    rows = chip.rows
    while rows > LANES and self.held(LANES, tile_rows=rows) > chip.budget:
      rows //= 2
    return rows

  def columns(self, *, tile_rows: int, chip: Chip) -> int:
    """Of a tile of N."""
    held = functools.partial(self.held, tile_rows=tile_rows)
    return tile_of_columns(self.width, held, chip=chip)

  def moved(self, columns: int) -> int:
    """Numbers to and from a core."""
    num_tiles, num_rows = pl.cdiv(self.width, columns), self.whole[0].shape[0]
    made = sum(self.output_widths(self.width))
    made += num_tiles * LANES if self.has_sums else 0
    read = num_tiles * sum(x.size for x in self.whole)
    read += sum(x.size for x in self.tiled)
    return (
      num_rows * made + read + sum(kernel.size for kernel, _ in self.kernels)
    )

  def fit_as_one_tile(self, tile_rows: int, chip: Chip) -> bool:
    """Whether a core has all columns in a step; two share tiles of them."""
    held = self.held(self.width, tile_rows=tile_rows)
    return chip.num_cores == 1 and held <= chip.budget


def by_rows(
  body: Callable[..., tuple[jax.Array, ...]],
  operands: Operands,
  *,
  visits: Visits,
  chip: Chip,
  name: str,
  in_place: bool = False,
) -> tuple[Float[Array, "R _"], ...]:
  """What `body` makes of rows and the kernels of their expert; else zeros.

  Args:
    body: of references to a tile of rows of all `whole`, of `tiled` and of
      `kernels`, in this order, the outputs; more than there are are left out.
    operands: see Operands.
    visits: the steps.
    chip: see Chip.
    name: of the kernel.
    in_place: the first tiled outputs take the memory of the tiled arrays.

  Returns:
    The outputs.
  """
  whole, tiled, kernels = operands.whole, operands.tiled, operands.kernels
  tile_rows, width = visits.tile_rows, operands.width
  num_rows, dtype = whole[0].shape[0], whole[0].dtype
  columns = operands.columns(tile_rows=tile_rows, chip=chip)
  assert columns == width or not operands.whole_outputs, columns
  num_tiles = pl.cdiv(width, columns)
  # Of a step, and of the arrays.
  made = [(n, dtype) for n in operands.output_widths(columns)]
  made_in_all = [(n, dtype) for n in operands.output_widths(width)]
  if operands.has_sums:
    made.append((LANES, jnp.dtype(jnp.float32)))
    made_in_all.append((num_tiles * LANES, jnp.dtype(jnp.float32)))
  num_outputs = len(made)

  def rows_at(column, step, tile, *refs):
    del column, refs
    return tile[step], 0

  def tile_at(column, step, tile, *refs):
    del refs
    return tile[step], column

  def kernel_at(column, step, tile, expert, *refs, axis):
    del tile, refs
    place = [expert[step], 0, 0]
    place[axis] = column
    return tuple(place)

  def kernel_spec(kernel, axis):
    shape = [None, *kernel.shape[1:]]
    shape[axis] = columns
    return pl.BlockSpec(tuple(shape), functools.partial(kernel_at, axis=axis))

  def run(tile_ref, expert_ref, first_ref, end_ref, *refs):
    del expert_ref
    inputs = refs[: -2 * num_outputs]
    outputs, others = refs[-2 * num_outputs : -num_outputs], refs[-num_outputs:]
    step = pl.program_id(1)
    left = width - pl.program_id(0) * columns if width % columns else None
    first, end = first_ref[step], end_ref[step]
    is_new = _is_new(tile_ref, step)
    is_part = (first < end) & (end - first < tile_rows)

    @pl.when(is_new & (first == end))
    def _():
      for out in outputs:
        out[...] = jnp.zeros_like(out)

    # The rows of other experts, which the step before has made, are kept aside.
    @pl.when(is_part)
    def _():
      for out, other in zip(outputs, others, strict=True):
        made = jnp.where(is_new, 0.0, out[...].astype(jnp.float32))
        other[...] = made.astype(other.dtype)

    @pl.when(first < end)
    def _():
      made = list(body(*inputs))
      if operands.has_sums:
        made[num_outputs - 1] = _sum_to_lanes(made[num_outputs - 1], left)
      for out, value in zip(outputs, made, strict=False):
        out[...] = value.astype(out.dtype)

    @pl.when(is_part)
    def _():
      for out, other in zip(outputs, others, strict=True):
        out[...] = _only(first, end, out[...], others=other[...])

  outs = [_like(whole[0], (num_rows, n), kind) for n, kind in made_in_all]
  all_columns = [
    pl.BlockSpec((tile_rows, n), rows_at) for n in operands.whole_outputs
  ]
  tile_of_them = pl.BlockSpec((tile_rows, columns), tile_at)
  tile_of_sums = [pl.BlockSpec((tile_rows, LANES), tile_at)]
  arrays = [*whole, *tiled, *(kernel for kernel, _ in kernels)]
  call = pl.pallas_call(
    run,
    out_shape=tuple(outs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(num_tiles, visits.tile.shape[0]),
      in_specs=[
        *(pl.BlockSpec((tile_rows, x.shape[1]), rows_at) for x in whole),
        *[tile_of_them] * len(tiled),
        *(kernel_spec(kernel, axis) for kernel, axis in kernels),
      ],
      out_specs=[
        *all_columns,
        *[tile_of_them] * operands.num_outputs,
        *tile_of_sums * operands.has_sums,
      ],
      scratch_shapes=[pltpu.VMEM((tile_rows, n), kind) for n, kind in made],
    ),
    # A tile is fetched once, however many experts it has.
    input_output_aliases={
      len(visits.arrays) + len(whole) + i: len(all_columns) + i
      for i in range(len(tiled) if in_place else 0)
    },
    compiler_params=_params(chip, num_dimensions=2),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_rows * operands.weights * width,
      transcendentals=num_rows * width,
      bytes_accessed=dtype.itemsize * operands.moved(columns),
    ),
    interpret=chip.interpret,
    name=name,
  )
  return tuple(call(*visits.arrays, *arrays))


def outer(
  x: Float[Array, "R K"],
  ys: list[Float[Array, "R N"]],
  *,
  visits: Visits,
  num_experts: int,
  chip: Chip,
  name: str,
) -> tuple[Float[Array, "E K N"], ...]:
  """x^T y of each expert, over all of its rows; zeros where it has none."""
  dtype, tile_rows = x.dtype, visits.tile_rows
  depth, width = x.shape[1], ys[0].shape[1]
  size, num_sums = dtype.itemsize, len(ys)
  part_rows = tile_rows // 2 if tile_rows % (2 * LANES) == 0 else tile_rows

  def held(rows: int, columns: int) -> int:
    moved = tile_rows * (rows + num_sums * columns)
    sums = num_sums * rows * columns
    return 2 * size * (moved + sums) + 4 * sums + 4 * rows * tile_rows

  tile, order = tiles_of_both(depth, width, held, chip=chip)

  def x_at(a, b, step, tile_ref, *refs):
    del refs
    return tile_ref[step], (a, b)[order[0]]

  def y_at(a, b, step, tile_ref, *refs):
    del refs
    return tile_ref[step], (a, b)[order[1]]

  def out_at(a, b, step, tile_ref, expert_ref, *refs):
    del tile_ref, refs
    return expert_ref[step], (a, b)[order[0]], (a, b)[order[1]]

  def run(tile_ref, expert_ref, first_ref, end_ref, x_ref, *refs):
    del tile_ref
    y_refs, outs = refs[:num_sums], refs[num_sums : 2 * num_sums]
    sums = refs[2 * num_sums :]
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    first, end = first_ref[step], end_ref[step]
    expert = expert_ref[step]
    before = expert_ref[jnp.maximum(step - 1, 0)]
    after = expert_ref[jnp.minimum(step + 1, last)]
    is_whole = end - first == tile_rows

    @pl.when((step == 0) | (before != expert))
    def _():
      for total in sums:
        total[...] = jnp.zeros_like(total)

    @pl.when(is_whole)
    def _():
      for y_ref, total in zip(y_refs, sums, strict=True):
        total[...] += dot(x_ref[...], y_ref[...], contract=(0, 0))

    # Of a tile that experts share, the halves that have rows of this one.
    for part, begin, stop in _parts(first, end, tile_rows, part_rows):

      @pl.when((begin < stop) & jnp.logical_not(is_whole))
      def _(part=part, begin=begin, stop=stop):
        left = _only(begin, stop, x_ref[part, :])
        for y_ref, total in zip(y_refs, sums, strict=True):
          right = _only(begin, stop, y_ref[part, :])
          total[...] += dot(left, right, contract=(0, 0))

    @pl.when((step == last) | (after != expert))
    def _():
      for out, total in zip(outs, sums, strict=True):
        out[...] = total[...].astype(out.dtype)

  grid = (pl.cdiv(depth, tile[0]), pl.cdiv(width, tile[1]))
  out = _like(x, (num_experts, depth, width), dtype)
  call = pl.pallas_call(
    run,
    out_shape=(out,) * num_sums,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(*(grid[axis] for axis in order), visits.tile.shape[0]),
      in_specs=[
        pl.BlockSpec((tile_rows, tile[0]), x_at),
        *[pl.BlockSpec((tile_rows, tile[1]), y_at)] * num_sums,
      ],
      out_specs=[pl.BlockSpec((None, *tile), out_at)] * num_sums,
      scratch_shapes=[pltpu.VMEM(tile, jnp.float32)] * num_sums,
    ),
    compiler_params=_params(chip, num_dimensions=3),
    cost_estimate=pl.CostEstimate(
      flops=2 * num_sums * x.size * width,
      transcendentals=0,
      bytes_accessed=size
      * (grid[1] * x.size + num_sums * (grid[0] * ys[0].size + out.size)),
    ),
    interpret=chip.interpret,
    name=name,
  )
  return tuple(call(*visits.arrays, x, *ys))


def deep(
  xs: Sequence[Float[Array, "R K"]],
  kernels: Sequence[tuple[Float[Array, "E _ _"], int]],
  *,
  visits: Visits,
  tile: Deep,
  chip: Chip,
  name: str,
) -> Float[Array, "R N"]:
  """The sum of x W over the xs, W of the expert of each row; else zeros.

  Of a long K that a core does not hold for many columns at once: a step takes a
  part of it, and the sums stay until the last.

  Args:
    xs: rows.
    kernels: of the xs, each with its axis of length N.
    visits: the steps.
    tile: see Deep.
    chip: see Chip.
    name: of the kernel.

  Returns:
    The products.
  """
  dtype, tile_rows = xs[0].dtype, visits.tile_rows
  num_rows, depth = xs[0].shape
  array, axis = kernels[0]
  width = array.shape[axis]
  num_parts = depth // tile.depth

  def part_at(step, part, first, end):
    # Nothing is fetched for a step without rows.
    return jnp.where(first[step] < end[step], part, num_parts - 1)

  def x_at(column, step, part, tile_ref, expert_ref, first, end):
    del column, expert_ref
    return tile_ref[step], part_at(step, part, first, end)

  def kernel_at(column, step, part, tile_ref, expert_ref, first, end, *, axis):
    del tile_ref
    place = [expert_ref[step], *[part_at(step, part, first, end)] * 2]
    place[axis] = column
    return tuple(place)

  def out_at(column, step, part, tile_ref, *refs):
    del part, refs
    return tile_ref[step], column

  def kernel_spec(axis):
    shape = [None, tile.depth, tile.depth]
    shape[axis] = tile.columns
    return pl.BlockSpec(tuple(shape), functools.partial(kernel_at, axis=axis))

  def run(tile_ref, expert_ref, first_ref, end_ref, *refs):
    del expert_ref
    *inputs, out, total = refs
    step, part = pl.program_id(1), pl.program_id(2)
    first, end = first_ref[step], end_ref[step]
    is_new = _is_new(tile_ref, step)
    is_whole = end - first == tile_rows
    is_last = part == num_parts - 1

    def add(rows):
      made = sum(
        dot(x[rows, :], kernel[...], contract=(1, 2 - axis))
        for x, kernel, (_, axis) in zip(
          inputs[: len(xs)], inputs[len(xs) :], kernels, strict=True
        )
      )
      total[rows, :] += made

    @pl.when((part == 0) & (first < end))
    def _():
      total[...] = jnp.zeros_like(total)

    @pl.when(is_whole)
    def _():
      add(slice(None))

    for rows, begin, stop in _parts(first, end, tile_rows, tile.part_rows):

      @pl.when((begin < stop) & jnp.logical_not(is_whole))
      def _(rows=rows):
        add(rows)

    @pl.when(is_last & is_new & (first == end))
    def _():
      out[...] = jnp.zeros_like(out)

    @pl.when(is_last & is_whole)
    def _():
      out[...] = total[...].astype(out.dtype)

    @pl.when(is_last & (first < end) & jnp.logical_not(is_whole))
    def _():
      others = jnp.where(is_new, 0.0, out[...].astype(jnp.float32))
      made = _only(first, end, total[...], others=others)
      out[...] = made.astype(out.dtype)

  out = _like(xs[0], (num_rows, width), dtype)
  num_columns = pl.cdiv(width, tile.columns)
  num_steps = visits.tile.shape[0]
  call = pl.pallas_call(
    run,
    out_shape=out,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(num_columns, num_steps, num_parts),
      in_specs=[
        *[pl.BlockSpec((tile_rows, tile.depth), x_at)] * len(xs),
        *(kernel_spec(axis) for _, axis in kernels),
      ],
      out_specs=pl.BlockSpec((tile_rows, tile.columns), out_at),
      scratch_shapes=[pltpu.VMEM((tile_rows, tile.columns), jnp.float32)],
    ),
    compiler_params=_params(chip, num_dimensions=3),
    cost_estimate=pl.CostEstimate(
      flops=2 * len(xs) * num_rows * depth * width,
      transcendentals=0,
      bytes_accessed=dtype.itemsize * tile.moved,
    ),
    interpret=chip.interpret,
    name=name,
  )
  return call(*visits.arrays, *xs, *(kernel for kernel, _ in kernels))


def _is_new(tile_ref, step):
  """Whether the step before had another tile of rows."""
  before = tile_ref[jnp.maximum(step - 1, 0)]
  return (step == 0) | (before != tile_ref[step])


def _parts(first, end, tile_rows: int, part_rows: int):
  """Of a tile, the parts: where they are, and of [first, end) their share."""
  for start in range(0, tile_rows, part_rows):
    begin = jnp.clip(first - start, 0, part_rows)
    stop = jnp.clip(end - start, 0, part_rows)
    yield pl.ds(start, part_rows), begin, stop


def _sum_to_lanes(x: jax.Array, left: jax.Array | None) -> jax.Array:
  """(R, C) -> (R, 128): column c is added to c modulo 128, if c < left."""
  rows, columns = x.shape
  if left is not None:
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    x = jnp.where(column < left, x, 0.0)
  total = jnp.zeros((rows, LANES), x.dtype)
  for start in range(0, columns, LANES):
    part = x[:, start : start + LANES]
    if part.shape[1] < LANES:
      part = jnp.pad(part, ((0, 0), (0, LANES - part.shape[1])))
    total += part
  return total


def _only(first, end, x: jax.Array, *, others=None) -> jax.Array:
  """Those rows, and else zeros or `others`.

  Selected in float32, which every TPU can.
  """
  value = x.astype(jnp.float32)
  row = jax.lax.broadcasted_iota(jnp.int32, value.shape, 0)
  other = 0.0 if others is None else others.astype(jnp.float32)
  mask = (row >= first) & (row < end)
  return jnp.where(mask, value, other).astype(x.dtype)


def _params(chip: Chip, *, num_dimensions: int) -> pltpu.CompilerParams:
  others = ("arbitrary",) * (num_dimensions - 1)
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", *others),
    vmem_limit_bytes=chip.memory * 15 // 16,
  )


def _like(x: jax.Array, shape, dtype) -> jax.ShapeDtypeStruct:
  """An output that varies over the mesh axes that `x` varies over."""
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )
