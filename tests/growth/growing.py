"""Tiny models and what a growth makes of them."""

from __future__ import annotations

import numpy as np

from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.growth.scale_up import scale_up
from tests.growth import tiny

# float64: 2^-52 times the sums of a forward pass.
EXACT = 1e-13


def grown(
  config: ModelConfig, target: ModelConfig, options: ScaleUp, **fields
) -> tuple[StoredModel, StoredModel]:
  source = tiny.stored(config, **(dict(moments=None) | fields))
  return source, scale_up(source, target, options, seed=3)


def difference(
  config: ModelConfig, target: ModelConfig, options: ScaleUp
) -> float:
  """The largest change of a logit of the source's tokens."""
  source, model = grown(config, target, options)
  before = tiny.logits(config, source.params)
  after = tiny.logits(model.config, model.params)[:, : config.vocab_size]
  return float(np.abs(after - before).max() / np.abs(before).max())
