"""SwiGLU experts as a loop over the blocks in use, for CPUs.

Of a plain matmul's rate, XLA:CPU gets a tenth with `jax.lax.ragged_dot` on
sorted rows, a third to three fifths with gathered kernels (reference.py), and
three fifths to nearly all with this loop: medians on 2 cores, float32, in
benchmarks/results/expert_ffn_cpu.json. The loop copies the kernels of one block
at a time instead of all blocks', skips the blocks that the padding left unused,
and adds weight gradients in place.

Neighbouring blocks of an expert are taken together, up to 512 rows: kernels are
copied, and their gradients read and written, once for all of them, and large
products are faster.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.kernels.expert_ffn import swiglu

Kernels = tuple[
  Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
]


# Rows of the blocks that are taken together, largest first. Each size is a loop
# of its own, to be compiled.
_CHUNK_ROWS = (512, 256)


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: Kernels,
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
) -> Float[Array, "P Q D"]:
  """As api.expert_ffn; reverse-mode differentiable only."""
  return _expert_ffn(rows, kernels, block_expert, num_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunks:
  """Where all chunks of one size lie: `size` blocks of an expert each."""

  size: int
  first_block: Int[Array, "N"]
  expert: Int[Array, "N"]
  count: Int[Array, ""]  # in use; they come first


def _chunks(
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  *,
  num_experts: int,
  block_size: int,
) -> list[_Chunks]:
  """Every block in use once: of each expert as large chunks as there are."""
  num_slots = len(block_expert)
  sizes = {rows // block_size for rows in _CHUNK_ROWS} | {1}
  left = swiglu.blocks_of_experts(
    block_expert, num_blocks, num_experts=num_experts
  )
  next_block = jnp.cumsum(left, dtype=jnp.int32) - left
  found = []
  for size in sorted(sizes, reverse=True):
    if not 1 <= size <= num_slots:
      continue
    of_expert = left // size
    end = jnp.cumsum(of_expert, dtype=jnp.int32)
    number = jnp.arange(num_slots // size, dtype=jnp.int32)
    expert = jnp.searchsorted(end, number, side="right")
    expert = jnp.minimum(expert, num_experts - 1)
    within = number - (end - of_expert)[expert]
    found.append(
      _Chunks(
        size=size,
        first_block=next_block[expert] + within * size,
        expert=expert,
        count=end[-1],
      )
    )
    next_block += of_expert * size
    left -= of_expert * size
  return found


def _rows(blocks: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Those of `size` blocks, (P, Q, D) -> (size * Q, D)."""
  some = jax.lax.dynamic_slice_in_dim(blocks, start, size)
  return some.reshape(-1, blocks.shape[-1])


def _set_rows(blocks: jax.Array, rows: jax.Array, start: jax.Array):
  rows = rows.reshape(-1, *blocks.shape[1:])
  return jax.lax.dynamic_update_slice_in_dim(blocks, rows, start, 0)


def _at(stack: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _add(stack: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
  value = _at(stack, index) + value
  return jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)


@jax.custom_vjp
def _expert_ffn(rows, kernels, block_expert, num_blocks):
  return _forward(rows, kernels, block_expert, num_blocks)[0]


def _plan(rows, kernels, block_expert, num_blocks) -> list[_Chunks]:
  # Constants reach the backward pass as NumPy's.
  return _chunks(
    jnp.asarray(block_expert),
    jnp.asarray(num_blocks),
    num_experts=kernels[0].shape[0],
    block_size=rows.shape[1],
  )


def _forward(rows, kernels, block_expert, num_blocks):
  gate, up, down = kernels

  def one_chunk(i, carry, chunks: _Chunks):
    out, gates, ups = carry
    expert, start = chunks.expert[i], chunks.first_block[i]
    x = _rows(rows, start, chunks.size)
    g, u = x @ _at(gate, expert), x @ _at(up, expert)
    y = (jax.nn.silu(g) * u) @ _at(down, expert)
    return (
      _set_rows(out, y, start),
      _set_rows(gates, g, start),
      _set_rows(ups, u, start),
    )

  hidden = jnp.zeros((*rows.shape[:2], gate.shape[-1]), rows.dtype)
  carry = (jnp.zeros_like(rows), hidden, hidden)
  for chunks in _plan(rows, kernels, block_expert, num_blocks):
    step = functools.partial(one_chunk, chunks=chunks)
    carry = jax.lax.fori_loop(0, chunks.count, step, carry)
  out, gates, ups = carry
  return out, (rows, kernels, block_expert, num_blocks, gates, ups)


def _backward(residuals, out_grad):
  rows, kernels, block_expert, num_blocks, gates, ups = residuals
  gate, up, down = kernels

  def one_chunk(i, carry, chunks: _Chunks):
    rows_grad, gate_grad, up_grad, down_grad = carry
    expert, start = chunks.expert[i], chunks.first_block[i]
    x, g, u, dy = (
      _rows(blocks, start, chunks.size)
      for blocks in (rows, gates, ups, out_grad)
    )
    dg, du, h = swiglu.gradients(g, u, dy @ _at(down, expert).T)
    dx = dg @ _at(gate, expert).T + du @ _at(up, expert).T
    return (
      _set_rows(rows_grad, dx, start),
      _add(gate_grad, x.T @ dg, expert),
      _add(up_grad, x.T @ du, expert),
      _add(down_grad, h.T @ dy, expert),
    )

  carry = (jnp.zeros_like(rows), *(jnp.zeros_like(k) for k in kernels))
  for chunks in _plan(rows, kernels, block_expert, num_blocks):
    step = functools.partial(one_chunk, chunks=chunks)
    carry = jax.lax.fori_loop(0, chunks.count, step, carry)
  rows_grad, *kernel_grads = carry
  return rows_grad, tuple(kernel_grads), None, None


_expert_ffn.defvjp(_forward, _backward)
