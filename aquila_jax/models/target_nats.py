"""What each target of a batch costs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Params
from aquila_jax.models.decoder_lm import DecoderLM


@functools.partial(jax.jit, static_argnames="config")
def target_nats(
  config: ModelConfig,
  params: Params,
  batch: Batch,
  mask_value: Float[Array, ""] | float | None = None,
) -> Float[Array, "B T"]:
  """-log probability of every target, 0 where it has no weight.

  Args:
    config: of the model.
    params: of the model.
    batch: packed rows.
    mask_value: of a growth mask, in place of the config's.

  Returns:
    At least float32.
  """
  out: Any = DecoderLM(config).apply(
    {"params": params},
    batch.tokens,
    positions=batch.positions,
    segments=batch.segments,
    mask_value=mask_value,
    targets=batch.targets,
  )
  nats = out.scores.z - out.scores.target
  # A product would turn an infinity of padding into NaN.
  return jnp.where(batch.weights > 0, nats, jnp.zeros((), nats.dtype))
