"""SwiGLU experts in Pallas, through Triton, for GPUs.

A block of rows belongs to one expert, so that a grouped matmul is a plain tiled
one whose right-hand side is looked up: no group begins inside a tile, and no
tile is computed twice. The gradient of a kernel is the sum over the blocks of
its expert, which lie together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from aquila_jax.core import dtypes
from aquila_jax.kernels.expert_ffn import swiglu
from aquila_jax.kernels.target import target

Kernels = tuple[
  Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
]
# Rows, columns and depth of a tile, of two bytes an element and of four. Triton
# multiplies nothing smaller than 16.
_TILES = {2: (128, 128, 64), 4: (64, 64, 32), 8: (32, 32, 16)}
_LEAST = 16


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: Kernels,
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  interpret: bool = False,
) -> Float[Array, "P Q D"]:
  """As api.expert_ffn; reverse-mode differentiable only.

  Args:
    rows: see there.
    kernels: see there.
    block_expert: see there.
    num_blocks: see there.
    interpret: runs the kernels' bodies without a GPU; for tests.

  Returns:
    One output row for each input row.

  Raises:
    NotImplementedError: off GPUs.
  """
  if not interpret and target().platform != "gpu":
    raise NotImplementedError("implementation='pallas_gpu' needs a GPU")
  return _expert_ffn(interpret, rows, kernels, block_expert, num_blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(interpret, rows, kernels, block_expert, num_blocks):
  return _forward(interpret, rows, kernels, block_expert, num_blocks)[0]


def _forward(interpret, rows, kernels, block_expert, num_blocks):
  gate, up, down = kernels
  times = functools.partial(
    _times, block_expert=block_expert, num_blocks=num_blocks
  )
  g = times(rows, gate, interpret=interpret)
  u = times(rows, up, interpret=interpret)
  out = times(jax.nn.silu(g) * u, down, interpret=interpret)
  return out, (rows, kernels, block_expert, num_blocks, g, u)


def _backward(interpret, residuals, out_grad):
  rows, kernels, block_expert, num_blocks, g, u = residuals
  gate, up, down = kernels
  times = functools.partial(
    _times,
    block_expert=block_expert,
    num_blocks=num_blocks,
    transpose=True,
    interpret=interpret,
  )
  outer = functools.partial(
    _outer,
    block_expert=block_expert,
    num_blocks=num_blocks,
    num_experts=gate.shape[0],
    interpret=interpret,
  )
  dg, du, h = swiglu.gradients(g, u, times(out_grad, down))
  dx = times(dg, gate) + times(du, up)
  grads = outer(rows, dg), outer(rows, du), outer(h, out_grad)
  return dx, grads, None, None


_expert_ffn.defvjp(_forward, _backward)


def _times(
  x: Float[Array, "P Q K"],
  kernels: Float[Array, "E K N"] | Float[Array, "E N K"],
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  transpose: bool = False,
  interpret: bool = False,
) -> Float[Array, "P Q N"]:
  """Each block times its expert's kernel, or the kernel's transpose."""
  num_blocks_at_most, num_rows, depth = x.shape
  width = kernels.shape[1 if transpose else 2]
  tile = _tile(x.dtype, rows=num_rows, columns=width, depth=depth)
  return _call(
    functools.partial(_times_kernel, tile=tile, transpose=transpose),
    jax.ShapeDtypeStruct((num_blocks_at_most, num_rows, width), x.dtype),
    grid=(
      num_blocks_at_most * pl.cdiv(num_rows, tile[0]),
      pl.cdiv(width, tile[1]),
    ),
    interpret=interpret,
    name="expert_times",
  )(block_expert, num_blocks.reshape(1), x, kernels)


def _times_kernel(
  expert_ref, used_ref, x_ref, kernel_ref, out_ref, *, tile, transpose
):
  _, num_rows, depth = x_ref.shape
  width = out_ref.shape[-1]
  of_block = pl.cdiv(num_rows, tile[0])
  block = pl.program_id(0) // of_block
  rows = _Range(pl.program_id(0) % of_block, tile[0], num_rows)
  columns = _Range(pl.program_id(1), tile[1], width)

  @pl.when(block < used_ref[0])
  def _():
    expert = expert_ref[block]

    def add(k, sum_):
      inner = _Range(k, tile[2], depth)
      a = _load(x_ref, block, rows, inner)
      if transpose:
        b = _load(kernel_ref, expert, columns, inner)
      else:
        b = _load(kernel_ref, expert, inner, columns)
      return sum_ + triton.dot(a, b, trans_b=transpose)

    zeros = jnp.zeros(tile[:2], dtypes.at_least_float32(x_ref.dtype))
    sum_ = jax.lax.fori_loop(0, pl.cdiv(depth, tile[2]), add, zeros)
    _store(out_ref, sum_, block, rows, columns)

  @pl.when(block >= used_ref[0])
  def _():
    zeros = jnp.zeros(tile[:2], out_ref.dtype)
    _store(out_ref, zeros, block, rows, columns)


def _outer(
  x: Float[Array, "P Q K"],
  y: Float[Array, "P Q N"],
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  num_experts: int,
  interpret: bool = False,
) -> Float[Array, "E K N"]:
  """x^T y of each expert, over all of its blocks."""
  counts = swiglu.blocks_of_experts(
    block_expert, num_blocks, num_experts=num_experts
  )
  ends = jnp.cumsum(counts, dtype=jnp.int32)
  depth, width = x.shape[-1], y.shape[-1]
  tile = _tile(x.dtype, rows=depth, columns=width, depth=x.shape[1])
  return _call(
    functools.partial(_outer_kernel, tile=tile),
    jax.ShapeDtypeStruct((num_experts, depth, width), x.dtype),
    grid=(num_experts, pl.cdiv(depth, tile[0]), pl.cdiv(width, tile[1])),
    interpret=interpret,
    name="expert_outer",
  )(ends - counts, ends, x, y)


def _outer_kernel(first_ref, end_ref, x_ref, y_ref, out_ref, *, tile):
  num_rows = x_ref.shape[1]
  expert = pl.program_id(0)
  rows = _Range(pl.program_id(1), tile[0], x_ref.shape[2])
  columns = _Range(pl.program_id(2), tile[1], y_ref.shape[2])
  of_block = pl.cdiv(num_rows, tile[2])

  def add(i, sum_):
    block, inner = i // of_block, _Range(i % of_block, tile[2], num_rows)
    a = _load(x_ref, block, inner, rows)
    b = _load(y_ref, block, inner, columns)
    return sum_ + triton.dot(a, b, trans_a=True)

  zeros = jnp.zeros(tile[:2], dtypes.at_least_float32(x_ref.dtype))
  sum_ = jax.lax.fori_loop(
    first_ref[expert] * of_block, end_ref[expert] * of_block, add, zeros
  )
  _store(out_ref, sum_, expert, rows, columns)


class _Range:
  """A tile's part of an axis, and where it ends inside of the axis."""

  def __init__(self, number: jax.Array, size: int, length: int):
    self.size = size
    self.slice = pl.ds(number * size, size)
    # None where every tile is whole, so that nothing is masked.
    left = length - number * size
    self.mask = jnp.arange(size) < left if length % size else None


def _mask(rows: _Range, columns: _Range) -> jax.Array | None:
  masks = []
  if rows.mask is not None:
    masks.append(rows.mask[:, None])
  if columns.mask is not None:
    masks.append(columns.mask[None, :])
  if not masks:
    return None
  shape = (rows.size, columns.size)
  return functools.reduce(
    jnp.logical_and, [jnp.broadcast_to(mask, shape) for mask in masks]
  )


def _load(ref, index, rows: _Range, columns: _Range) -> jax.Array:
  mask = _mask(rows, columns)
  place = ref.at[index, rows.slice, columns.slice]
  if mask is None:
    return triton.load(place)
  return triton.load(place, mask=mask, other=0.0)


def _store(ref, value, index, rows: _Range, columns: _Range) -> None:
  place = ref.at[index, rows.slice, columns.slice]
  triton.store(place, value.astype(ref.dtype), mask=_mask(rows, columns))


def _tile(dtype, *, rows: int, columns: int, depth: int) -> tuple[int, ...]:
  """Powers of two, no larger than what they cover where that is small."""
  largest = _TILES[jnp.dtype(dtype).itemsize]
  return tuple(
    max(_LEAST, min(size, pl.next_power_of_2(length)))
    for size, length in zip(largest, (rows, columns, depth), strict=True)
  )


def _call(body, out, *, grid, interpret: bool, name: str):
  return pl.pallas_call(
    body,
    out_shape=out,
    grid=grid,
    interpret=interpret,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=4),
    name=name,
  )
