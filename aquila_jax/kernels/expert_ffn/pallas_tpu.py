"""SwiGLU experts in Pallas for TPUs.

Rows lie in groups of one expert each. Every step of a grid takes a tile of rows
and the kernels of one expert, which are fetched once for all of its tiles; a
tile in which experts meet is taken once for each of them (tpu_visits.py), so
that the size of the blocks does not matter to the matrix unit. This is the
scheme of MegaBlocks (Gale et al., 2022, arXiv:2211.15841) as in jax's megablox.

We differ where it costs time: what is computed element by element is done where
a product leaves the matrix unit; what shares rows is one kernel (gate and up,
and their gradients; down too, where a core holds all of an expert); and only
tiles in which experts meet are masked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from aquila_jax.kernels.expert_ffn import swiglu
from aquila_jax.kernels.expert_ffn.tpu_tiles import (
  LANES,
  Chip,
  tile_of_columns,
  tiles_of_both,
  with_rows_that_fit,
)
from aquila_jax.kernels.expert_ffn.tpu_visits import Visits
from aquila_jax.kernels.target import target

Kernels = tuple[
  Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
]
# Of a tile, in products of rows and in the gradients of kernels.
TILE_ROWS = (256, 512)


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: Kernels,
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  device_kind: str | None = None,
  tile_rows: tuple[int, int] = TILE_ROWS,
  interpret: bool = False,
) -> Float[Array, "P Q D"]:
  """As api.expert_ffn; reverse-mode differentiable only.

  Inside of shard_map, with types checked or not, it is the shard's.

  Args:
    rows: see there.
    kernels: see there.
    block_expert: see there.
    num_blocks: see there.
    device_kind: None is the target's (kernels/target.py).
    tile_rows: of a tile, in products of rows and in the gradients of kernels.
    interpret: runs the kernels' bodies without a TPU; for tests.

  Returns:
    One output row for each input row.

  Raises:
    NotImplementedError: off TPUs, and where rows or kernels are neither
      bfloat16 nor float32.
  """
  dtypes = {str(x.dtype) for x in (rows, *kernels)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    raise NotImplementedError(
      "implementation='pallas_tpu': rows and kernels of"
      f" {', '.join(sorted(dtypes))}; need all bfloat16 or all float32"
    )
  is_absent = device_kind is None and target().platform != "tpu"
  if is_absent and not interpret:
    raise NotImplementedError("implementation='pallas_tpu' needs a TPU")
  chip = Chip.of(
    device_kind or target().device_kind,
    rows=tile_rows[0],
    outer_rows=tile_rows[1],
    interpret=interpret,
  )
  chip = with_rows_that_fit(chip, kernels[0])
  group_rows = rows.shape[1] * swiglu.blocks_of_experts(
    jnp.asarray(block_expert),
    jnp.asarray(num_blocks),
    num_experts=kernels[0].shape[0],
  )
  flat = rows.reshape(-1, rows.shape[-1])  # (P, Q, D) -> (R, D)
  out: Any = _expert_ffn(chip, *_on_same_axes(flat, kernels, group_rows))
  return out.reshape(rows.shape)


def _on_same_axes(*arguments):
  """Inside of shard_map: all vary over the axes that one of them varies over.

  So a kernel that shards share gets the sum of their gradients.
  """
  axes = frozenset().union(
    *(_varying(leaf) for leaf in jax.tree.leaves(arguments))
  )

  def vary(leaf):
    missing = tuple(axes - _varying(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(vary, arguments)


def _varying(leaf: jax.Array) -> frozenset:
  return jax.typeof(leaf).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(chip, rows, kernels, group_rows):
  return _outputs(chip, rows, kernels, group_rows, keep=False)[0]


def _forward(chip, rows, kernels, group_rows):
  out, g, u = _outputs(chip, rows, kernels, group_rows, keep=True)
  return out, (rows, kernels, group_rows, g, u)


def _backward(chip, residuals, out_grad):
  rows, kernels, group_rows, g, u = residuals
  visits = _visits(rows, group_rows, chip=chip)
  dx, dg, du, hidden = _gradients_of_rows(
    out_grad, g, u, kernels, visits=visits, chip=chip
  )
  outer = functools.partial(
    _outer,
    visits=_visits(rows, group_rows, chip=chip, outer=True),
    num_experts=kernels[0].shape[0],
    chip=chip,
  )
  gate_grad, up_grad = outer(rows, [dg, du], name="expert_gate_up_gradient")
  (down_grad,) = outer(hidden, [out_grad], name="expert_down_gradient")
  return dx, (gate_grad, up_grad, down_grad), None


_expert_ffn.defvjp(_forward, _backward)


def _visits(rows, group_rows, *, chip: Chip, outer: bool = False) -> Visits:
  tile_rows = chip.outer_rows if outer else chip.rows
  return Visits.of_rows(
    group_rows,
    num_rows=rows.shape[0],
    tile_rows=min(tile_rows, rows.shape[0]),
    empty_experts=outer,
  )


def _outputs(chip, rows, kernels, group_rows, *, keep: bool):
  """The outputs, and where they are kept x gate and x up.

  In one visit where a core has all of an expert: hidden units stay there.
  """
  gate, up, down = kernels
  visits = _visits(rows, group_rows, chip=chip)
  by_rows = functools.partial(_by_rows, visits=visits, chip=chip)
  operands = _Operands(
    whole=[rows],
    kernels=[(gate, 2), (up, 2), (down, 1)],
    num_outputs=2 if keep else 0,
    whole_outputs=[rows.shape[1]],
  )
  if operands.fit_as_one_tile(visits.tile_rows, chip):
    return by_rows(_gated_and_down, operands, name="expert_hidden_and_output")
  hidden_operands = _Operands(
    whole=[rows], kernels=[(gate, 2), (up, 2)], num_outputs=3 if keep else 1
  )
  hidden, *kept = by_rows(_gated, hidden_operands, name="expert_gate_up")
  out_operands = _Operands(whole=[hidden], kernels=[(down, 2)], num_outputs=1)
  (out,) = by_rows(_product, out_operands, name="expert_down")
  return out, *kept


def _gradients_of_rows(dy, g, u, kernels, *, visits: Visits, chip: Chip):
  """dx, dg, du and hidden: in one visit where a core has all of an expert.

  So dg and du are not read again, for which v6e would have to wait.
  """
  gate, up, down = kernels
  by_rows = functools.partial(_by_rows, visits=visits, chip=chip)
  hidden_operands = _Operands(
    whole=[dy], tiled=[g, u], kernels=[(down, 1)], num_outputs=3
  )
  operands = dataclasses.replace(
    hidden_operands,
    kernels=[(down, 1), (gate, 2), (up, 2)],
    whole_outputs=[dy.shape[1]],
  )
  if operands.fit_as_one_tile(visits.tile_rows, chip):
    return by_rows(
      _hidden_and_rows_gradients,
      operands,
      in_place=True,
      name="expert_hidden_and_rows_gradients",
    )
  dg, du, hidden = by_rows(
    _hidden_gradients,
    hidden_operands,
    in_place=True,
    name="expert_hidden_gradients",
  )
  rows_operands = _Operands(
    whole=[dg, du], kernels=[(gate, 1), (up, 1)], num_outputs=1
  )
  (dx,) = by_rows(_rows_gradient, rows_operands, name="expert_rows_gradient")
  return dx, dg, du, hidden


def _dot(a, b, *, contract: tuple[int, int] = (1, 0)):
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _gated(x, gate, up):
  g, u = _dot(x[...], gate[...]), _dot(x[...], up[...])
  return jax.nn.silu(g) * u, g, u


def _gated_and_down(x, gate, up, down):
  hidden, g, u = _gated(x, gate, up)
  # As it is stored where `down` is another kernel's.
  return _dot(hidden.astype(x.dtype), down[...]), g, u


def _product(hidden, down):
  return (_dot(hidden[...], down[...]),)


def _hidden_gradients(dy, g, u, down):
  g, u = g[...].astype(jnp.float32), u[...].astype(jnp.float32)
  dh = _dot(dy[...], down[...], contract=(1, 1))
  return swiglu.gradients(g, u, dh)


def _rows_gradient(dg, du, gate, up):
  dx = _dot(dg[...], gate[...], contract=(1, 1))
  return (dx + _dot(du[...], up[...], contract=(1, 1)),)


def _hidden_and_rows_gradients(dy, g, u, down, gate, up):
  dg, du, hidden = _hidden_gradients(dy, g, u, down)
  # As they are stored: dx is that of two kernels.
  stored = dg.astype(dy.dtype), du.astype(dy.dtype)
  return *_rows_gradient(*stored, gate, up), dg, du, hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Operands:
  """What a kernel over rows has of a tile of them in a step, and makes."""

  whole: Sequence[jax.Array]  # [R, K]: all columns
  tiled: Sequence[jax.Array] = ()  # [R, N]: a tile of columns
  # Of the rows' expert, each with the axis of length N that is in tiles.
  kernels: Sequence[tuple[jax.Array, int]]
  num_outputs: int  # [R, N]: a tile of columns
  # [R, K] of these widths, before the others: all columns. They need all N at
  # once, so that there can be but one tile.
  whole_outputs: Sequence[int] = ()

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
    return 2 * size * moved + 4 * products + size * tile_rows * made

  def fit_as_one_tile(self, tile_rows: int, chip: Chip) -> bool:
    """Whether a core has all columns in a step; two share tiles of them."""
    held = self.held(self.width, tile_rows=tile_rows)
    return chip.num_cores == 1 and held <= chip.budget


def _by_rows(
  body: Callable[..., tuple[jax.Array, ...]],
  operands: _Operands,
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
    operands: see _Operands.
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
  held = functools.partial(operands.held, tile_rows=tile_rows)
  columns = tile_of_columns(width, held, chip=chip)
  assert columns == width or not operands.whole_outputs, columns
  widths = operands.output_widths(columns)
  num_outputs = len(widths)

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
    first, end = first_ref[step], end_ref[step]
    is_new = (step == 0) | (
      tile_ref[jnp.maximum(step - 1, 0)] != tile_ref[step]
    )
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
      for out, value in zip(outputs, body(*inputs), strict=False):
        out[...] = value.astype(out.dtype)

    @pl.when(is_part)
    def _():
      for out, other in zip(outputs, others, strict=True):
        out[...] = _only(first, end, out[...], others=other[...])

  outs = [
    _like(whole[0], (num_rows, n), dtype) for n in operands.output_widths(width)
  ]
  all_columns = [
    pl.BlockSpec((tile_rows, n), rows_at) for n in operands.whole_outputs
  ]
  tile_of_them = pl.BlockSpec((tile_rows, columns), tile_at)
  arrays = [*whole, *tiled, *(kernel for kernel, _ in kernels)]
  moved = pl.cdiv(width, columns) * sum(x.size for x in whole)
  moved += sum(x.size for x in (*arrays[len(whole) :], *outs))
  call = pl.pallas_call(
    run,
    out_shape=tuple(outs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(pl.cdiv(width, columns), visits.tile.shape[0]),
      in_specs=[
        *(pl.BlockSpec((tile_rows, x.shape[1]), rows_at) for x in whole),
        *[tile_of_them] * len(tiled),
        *(kernel_spec(kernel, axis) for kernel, axis in kernels),
      ],
      out_specs=[*all_columns, *[tile_of_them] * operands.num_outputs],
      scratch_shapes=[pltpu.VMEM((tile_rows, n), dtype) for n in widths],
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
      bytes_accessed=dtype.itemsize * moved,
    ),
    interpret=chip.interpret,
    name=name,
  )
  return tuple(call(*visits.arrays, *arrays))


def _outer(
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
        total[...] += _dot(x_ref[...], y_ref[...], contract=(0, 0))

    # Of a tile that experts share, the halves that have rows of this one.
    for start in range(0, tile_rows, part_rows):
      part = pl.ds(start, part_rows)
      begin = jnp.clip(first - start, 0, part_rows)
      stop = jnp.clip(end - start, 0, part_rows)

      @pl.when((begin < stop) & jnp.logical_not(is_whole))
      def _(part=part, begin=begin, stop=stop):
        left = _only(begin, stop, x_ref[part, :])
        for y_ref, total in zip(y_refs, sums, strict=True):
          right = _only(begin, stop, y_ref[part, :])
          total[...] += _dot(left, right, contract=(0, 0))

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
