"""Floats as integers in the order of `jax.lax.top_k`, NaN included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Below every key but that of one NaN, and behind every expert.
NO_KEY = -(2**31)
NO_EXPERT = 2**30


def key(x: Float[Array, "*N"]) -> Int[Array, "*N"]:
  """Integers in the order of `x`."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value(keys: Int[Array, "*N"]) -> Float[Array, "*N"]:
  """What `key` was of."""
  bits = keys ^ ((keys >> 31) & 0x7FFFFFFF)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
