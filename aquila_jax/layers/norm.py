"""Root-mean-square normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core import axes, dtypes


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + epsilon) * scale, computed in float32.

  Zhang and Sennrich, arXiv 1910.07467. The scale *writes* embed, except in
  front of a tied LM head, where it *reads* embed: growth then divides it by the
  counts in the head's stead, since the one table is copied for the embedding.

  Attributes:
    epsilon: added to the mean square.
    scale_axis: `axes.writes("embed")` or `axes.reads("embed")`; of queries and
      keys `axes.writes("head_dim")`.
    param_dtype: of the scale.
  """

  epsilon: float
  scale_axis: axes.Axis
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    scale = self.param(
      "scale",
      axes.declare(nn.initializers.ones, [self.scale_axis], is_norm_scale=True),
      (x.shape[-1],),
      self.param_dtype,
    )
    # At least float32: the mean of squares loses too much in bfloat16.
    dtype = dtypes.at_least_float32(x.dtype)
    wide = x.astype(dtype)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + self.epsilon)
    scale = jnp.expand_dims(scale.astype(dtype), tuple(range(x.ndim - 1)))
    return (normed * scale).astype(x.dtype)
