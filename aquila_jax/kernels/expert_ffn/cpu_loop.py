"""SwiGLU experts as a loop over the blocks in use, for CPUs.

Of a plain matmul's rate, XLA:CPU gets a tenth with `jax.lax.ragged_dot` on
sorted rows, a third to three fifths with gathered kernels (reference.py), and
three fifths to nearly all with this loop: medians on 2 cores, float32, in
benchmarks/results/expert_ffn_cpu.json. The loop copies the kernels of one block
at a time instead of all blocks', skips the blocks that the padding left unused,
and adds weight gradients in place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.kernels.expert_ffn import swiglu

Kernels = tuple[
  Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
]


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: Kernels,
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
) -> Float[Array, "P Q D"]:
  """As api.expert_ffn; reverse-mode differentiable only."""
  return _expert_ffn(rows, kernels, block_expert, num_blocks)


def _at(stack: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)


def _set(stack: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)


@jax.custom_vjp
def _expert_ffn(rows, kernels, block_expert, num_blocks):
  return _forward(rows, kernels, block_expert, num_blocks)[0]


def _forward(rows, kernels, block_expert, num_blocks):
  gate, up, down = kernels

  def one_block(i, carry):
    out, gates, ups = carry
    expert, x = block_expert[i], _at(rows, i)
    g, u = x @ _at(gate, expert), x @ _at(up, expert)
    out = _set(out, (jax.nn.silu(g) * u) @ _at(down, expert), i)
    return out, _set(gates, g, i), _set(ups, u, i)

  hidden = jnp.zeros((*rows.shape[:2], gate.shape[-1]), rows.dtype)
  out, gates, ups = jax.lax.fori_loop(
    0, num_blocks, one_block, (jnp.zeros_like(rows), hidden, hidden)
  )
  return out, (rows, kernels, block_expert, num_blocks, gates, ups)


def _backward(residuals, out_grad):
  rows, kernels, block_expert, num_blocks, gates, ups = residuals
  gate, up, down = kernels

  def one_block(i, carry):
    rows_grad, gate_grad, up_grad, down_grad = carry
    expert, x = block_expert[i], _at(rows, i)
    g, u, dy = _at(gates, i), _at(ups, i), _at(out_grad, i)
    dg, du, h = swiglu.gradients(g, u, dy @ _at(down, expert).T)
    dx = dg @ _at(gate, expert).T + du @ _at(up, expert).T
    return (
      _set(rows_grad, dx, i),
      _set(gate_grad, _at(gate_grad, expert) + x.T @ dg, expert),
      _set(up_grad, _at(up_grad, expert) + x.T @ du, expert),
      _set(down_grad, _at(down_grad, expert) + h.T @ dy, expert),
    )

  zeros = (jnp.zeros_like(rows), *(jnp.zeros_like(k) for k in kernels))
  rows_grad, *kernel_grads = jax.lax.fori_loop(0, num_blocks, one_block, zeros)
  return rows_grad, tuple(kernel_grads), None, None


_expert_ffn.defvjp(_forward, _backward)
