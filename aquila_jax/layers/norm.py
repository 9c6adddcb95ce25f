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

  Under a mask c, which says how much each dimension counts, the mean has the
  weights c: y = c x / sqrt(sum(c x^2) / sum(c) + epsilon) * scale.

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
  def __call__(
    self, x: Float[Array, "*rows D"], mask: Float[Array, "D"] | None = None
  ) -> Float[Array, "*rows D"]:
    scale = self.param(
      "scale",
      axes.declare(nn.initializers.ones, [self.scale_axis], is_norm_scale=True),
      (x.shape[-1],),
      self.param_dtype,
    )
    # At least float32: the mean of squares loses too much in bfloat16.
    dtype = dtypes.at_least_float32(x.dtype)
    wide = x.astype(dtype)
    square, scale = jnp.square(wide), scale.astype(dtype)
    row_axes = tuple(range(x.ndim - 1))
    if mask is None:
      variance = jnp.mean(square, axis=-1, keepdims=True)
    else:
      mask = mask.astype(dtype)
      square = square * jnp.expand_dims(mask, row_axes)
      variance = jnp.sum(square, axis=-1, keepdims=True) / jnp.sum(mask)
      scale = scale * mask
    normed = wide * jax.lax.rsqrt(variance + self.epsilon)
    scale = jnp.expand_dims(scale, row_axes)
    return (normed * scale).astype(x.dtype)
