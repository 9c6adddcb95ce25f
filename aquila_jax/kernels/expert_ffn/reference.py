"""SwiGLU experts over blocks of rows, in plain XLA: the oracle."""

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
  """Gathers each block's kernels, then three batched matmuls; see api.py."""
  gate, up, down = (kernel[block_expert] for kernel in kernels)
  hidden = jax.nn.silu(jnp.einsum("PQD,PDF->PQF", rows, gate))
  hidden = hidden * jnp.einsum("PQD,PDF->PQF", rows, up)
  out = jnp.einsum("PQF,PFD->PQD", hidden, down)
  used = swiglu.in_use(block_expert, num_blocks)
  return jnp.where(used[:, None, None], out, jnp.zeros((), out.dtype))
