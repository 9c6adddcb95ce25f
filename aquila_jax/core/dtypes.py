"""The dtype of what must not be computed in half precision."""

from __future__ import annotations

import jax.numpy as jnp


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
  """float64 stays; everything narrower becomes float32.

  For norms, softmax, the router and losses: float64 tests then run in float64
  throughout.
  """
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
