"""A tiny model, tiny endless data, and jobs over them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from aquila_jax.core.experiment_config import (
  CheckpointConfig,
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.types import Batch, Params
from aquila_jax.data.loader import DataState
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training.inputs import TrainInput
from aquila_jax.training.loop import TrainJob
from aquila_jax.training.state import InitialModel

LANGUAGES = ("en", "zh")
VOCAB = 64


@functools.cache
def _params(model: ModelConfig) -> Params:
  return jax.jit(functools.partial(decoder_lm.init_params, model))(
    key=jax.random.key(0)
  )


@dataclasses.dataclass(frozen=True)
class Tiny:
  """Makes everything that a test of training needs, with chosen fields."""

  def model(self, **fields) -> ModelConfig:
    defaults: dict[str, Any] = dict(
      vocab_size=VOCAB,
      num_layers=2,
      embed_dim=16,
      mlp_dim=24,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      context_length=16,
      compute_dtype="float32",
    )
    return ModelConfig(**(defaults | fields))

  def moe(self, **fields) -> ModelConfig:
    return self.model(moe=MoeConfig(num_experts=4, block_size=8), **fields)

  def params(self, model: ModelConfig) -> Params:
    return _params(model)

  def config(self, **fields) -> TrainConfig:
    defaults: dict[str, Any] = dict(
      steps=6,
      batch_size=8,
      sequence_length=16,
      # Constant, so that configs of any length share one compiled program.
      optimizer=OptimizerConfig(
        learning_rate=0.01, warmup_steps=2, schedule="constant"
      ),
      checkpoint=CheckpointConfig(every_steps=100, every_seconds=0.0),
      log_every=2,
    )
    return TrainConfig(**(defaults | fields))

  def batch(self, row: int = 0, *, rows: int = 8, length: int = 16) -> Batch:
    """Two documents a row and some padding; a pure function of `row`."""
    rng = np.random.default_rng(row)
    tokens = rng.integers(0, VOCAB // 2, (rows, length), np.int32)
    cuts = rng.integers(4, length - 4, (rows, 1), np.int32)
    ends = length - rng.integers(0, 3, (rows, 1), np.int32)
    index = np.arange(length, dtype=np.int32)[None]
    second = index >= cuts
    segments = np.where(index < ends, 1 + second, 0).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    following = np.roll(segments, -1, axis=1)
    following[:, -1] = 0
    weights = ((segments > 0) & (segments == following)).astype(np.float32)
    arrays: dict[str, Any] = dict(
      tokens=tokens,
      targets=targets,
      weights=weights,
      segments=segments,
      positions=(index - np.where(second, cuts, 0)).astype(np.int32),
      languages=np.broadcast_to(second, tokens.shape).astype(np.int32),
    )
    return Batch(**arrays)

  def input(self, config: TrainConfig, **overrides) -> TrainInput:
    def batches(state: DataState) -> Iterator[tuple[Batch, DataState]]:
      rows = state.rows
      while True:
        batch = self.batch(
          rows, rows=config.batch_size, length=config.sequence_length
        )
        rows += config.batch_size
        yield batch, DataState(rows=rows, tokens={"en": 2 * rows, "zh": rows})

    fields: dict[str, Any] = dict(
      languages=LANGUAGES,
      batches=batches,
      epochs=lambda state: {"en": state.rows / 100},
    )
    return TrainInput(**(fields | overrides))

  def job(
    self,
    workdir,
    *,
    model: ModelConfig | None = None,
    config: TrainConfig | None = None,
    devices: int = 1,
    **fields,
  ) -> TrainJob:
    model = model or self.model()
    config = config or self.config()
    defaults: dict[str, Any] = dict(
      stage="tiny",
      model=model,
      train=config,
      total_steps=config.steps,
      mesh=make_mesh(MeshConfig(), jax.devices()[:devices]),
      workdir=epath.Path(workdir),
      input=self.input(config),
      data_state=DataState(rows=0, tokens={"en": 0, "zh": 0}),
      initial=lambda: InitialModel(params=self.params(model)),
      flops_per_token=100.0,
      config_path="config.stages.tiny",
    )
    return TrainJob(**(defaults | fields))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
  """See `Tiny`."""
  return Tiny()
