"""Rotary position embeddings (RoPE), arXiv 2104.09864."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core import dtypes


def rotary_tables(
  positions: Int[Array, "B T"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
  """Cosine and sine of position * theta^(-2i / H), float32, H2 = H / 2."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = theta**-exponent
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x: Float[Array, "B T *heads H"],
  tables: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
) -> Float[Array, "B T *heads H"]:
  """Rotates each pair (x[i], x[i + H/2]) by its position's angle.

  The two halves are paired as in GPT-NeoX and Llama's Hugging Face layout, not
  neighbours as in the paper; a fixed permutation of H lies between the two.

  Args:
    x: queries or keys, with any number of head axes between T and H.
    tables: from `rotary_tables` for the same positions.

  Returns:
    The rotated array, in the dtype of `x`.
  """
  head_axes = tuple(range(2, x.ndim - 1))
  cos, sin = (
    jnp.expand_dims(table, head_axes).astype(dtypes.at_least_float32(x.dtype))
    for table in tables
  )
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)
