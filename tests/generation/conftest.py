"""Fixtures of the generation tests."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.generation.generate import TextModel
from aquila_jax.models import decoder_lm
from tests.generation.tiny import text_model


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def model(request) -> TextModel:
  """A dense model and a mixture of experts."""
  return text_model(request.param)


@functools.cache
def _jitted(config: ModelConfig):
  return jax.jit(
    lambda params, tokens, segments: decoder_lm.DecoderLM(config).apply(
      {"params": params},
      tokens,
      positions=jnp.arange(tokens.shape[1])[None],
      segments=segments,
    )
  )


@pytest.fixture
def uncached_logits():
  """Logits after a prefix, without cache, left padding or buckets."""

  def logits(model: TextModel, tokens: list[int]):
    # Padding on the right, behind the prefix, so that one program serves all
    # lengths: causality keeps it out of sight.
    size = model.config.context_length
    row = jnp.asarray([tokens + [0] * (size - len(tokens))], jnp.int32)
    segments = (jnp.arange(size)[None] < len(tokens)).astype(jnp.int32)
    config = model.config
    if config.moe is not None:
      dropless = dataclasses.replace(config.moe, capacity_factor=None)
      config = dataclasses.replace(config, moe=dropless)
    out: Any = _jitted(config)(model.params, row, segments)
    return out.logits[0, len(tokens) - 1]

  return logits
