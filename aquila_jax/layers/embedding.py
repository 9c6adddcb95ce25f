"""Token embedding and LM head, tied or not."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from aquila_jax.core import axes, dtypes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.layers.linear import project


class Embedding(nn.Module):
  """A table [V, D]; `vocab` is an index, not an input: it neither reads it."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.table = self.param(
      "table",
      axes.declare(
        nn.initializers.normal(config.init_std),
        [axes.neither("vocab"), axes.writes("embed")],
      ),
      (config.vocab_size, config.embed_dim),
      jnp.dtype(config.param_dtype),
    )

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the table in the compute dtype."""
    return self.table.astype(jnp.dtype(self.config.compute_dtype))[tokens]

  def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """The tied LM head: float32 logits x E^T."""
    return project(
      x,
      self.head(x.dtype),
      out_dtype=dtypes.at_least_float32(x.dtype),
    )

  def head(self, dtype: DTypeLike) -> Float[Array, "D V"]:
    """The kernel of the tied LM head."""
    return self.table.astype(dtype).T


class LMHead(nn.Module):
  """An untied head [D, V], reads embed and writes vocab; float32 logits."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.kernel = self.param(
      "kernel",
      axes.declare(
        nn.initializers.normal(config.init_std),
        [axes.reads("embed"), axes.writes("vocab")],
      ),
      (config.embed_dim, config.vocab_size),
      jnp.dtype(config.param_dtype),
    )

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return project(
      x,
      self.head(x.dtype),
      out_dtype=dtypes.at_least_float32(x.dtype),
    )

  def head(self, dtype: DTypeLike) -> Float[Array, "D V"]:
    """The kernel."""
    return self.kernel.astype(dtype)
