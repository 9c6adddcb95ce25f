"""Token embedding and LM head, tied or not."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
      self.table.astype(x.dtype).T,  # (V, D) -> (D, V)
      out_dtype=dtypes.at_least_float32(x.dtype),
    )


class LMHead(nn.Module):
  """An untied head [D, V], reads embed and writes vocab; float32 logits."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    config = self.config
    kernel = self.param(
      "kernel",
      axes.declare(
        nn.initializers.normal(config.init_std),
        [axes.reads("embed"), axes.writes("vocab")],
      ),
      (config.embed_dim, config.vocab_size),
      jnp.dtype(config.param_dtype),
    )
    return project(
      x,
      kernel.astype(x.dtype),
      out_dtype=dtypes.at_least_float32(x.dtype),
    )
