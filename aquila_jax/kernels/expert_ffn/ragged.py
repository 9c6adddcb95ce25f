"""SwiGLU experts by `jax.lax.ragged_dot`, the compiler's own grouped matmul."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.kernels.expert_ffn import swiglu


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: tuple[
    Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
  ],
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
) -> Float[Array, "P Q D"]:
  """The blocks of an expert as one group of rows; see api.py."""
  gate, up, down = kernels
  used = swiglu.in_use(block_expert, num_blocks)
  sizes = rows.shape[1] * swiglu.blocks_of_experts(
    block_expert, num_blocks, num_experts=gate.shape[0]
  )
  # ragged_dot says nothing of rows behind the last group.
  x = jnp.where(used[:, None, None], rows, jnp.zeros((), rows.dtype))
  x = x.reshape(-1, rows.shape[-1])  # (P, Q, D) -> (R, D)
  hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, sizes))
  hidden = hidden * jax.lax.ragged_dot(x, up, sizes)
  out = jax.lax.ragged_dot(hidden, down, sizes).reshape(rows.shape)
  return jnp.where(used[:, None, None], out, jnp.zeros((), out.dtype))
