"""What backends share: the derivatives of SwiGLU, and whose a block is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def gradients(
  g: Float[Array, "*P Q F"],
  u: Float[Array, "*P Q F"],
  dh: Float[Array, "*P Q F"],
) -> tuple[
  Float[Array, "*P Q F"], Float[Array, "*P Q F"], Float[Array, "*P Q F"]
]:
  """Of h = silu(g) * u the gradients of g and of u, and h itself."""
  sigmoid = jax.nn.sigmoid(g)
  silu = g * sigmoid
  # d silu(g) / dg = sigmoid + silu * (1 - sigmoid)
  dg = dh * u * (sigmoid + silu * (1 - sigmoid))
  return dg, dh * silu, silu * u


def in_use(
  block_expert: Int[Array, "P"], num_blocks: Int[Array, ""]
) -> Bool[Array, "P"]:
  """Whether a block is: the first `num_blocks` are."""
  return jnp.arange(len(block_expert), dtype=num_blocks.dtype) < num_blocks


def blocks_of_experts(
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  *,
  num_experts: int,
) -> Int[Array, "E"]:
  """How many of the blocks in use each expert has."""
  used = in_use(block_expert, num_blocks).astype(jnp.int32)
  return jnp.zeros(num_experts, jnp.int32).at[block_expert].add(used)
