"""A training step and what it takes, for benchmarks that time it."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax.core.experiment_config import MeshConfig, TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, TrainState
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training import state as state_lib
from aquila_jax.training.balance import initial_weights
from aquila_jax.training.program import make_program


def _batch(config: TrainConfig, *, vocab_size: int) -> Batch:
  shape = (config.batch_size, config.sequence_length)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, vocab_size)
  positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  return Batch(
    tokens=tokens,
    targets=jnp.roll(tokens, -1, axis=1),
    weights=jnp.ones(shape, jnp.float32),
    segments=jnp.ones(shape, jnp.int32),
    positions=positions,
    languages=jnp.zeros(shape, jnp.int32),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
  """A step, and a state and a batch for it. The step consumes the state."""

  call: Any  # (state, batch) -> (state, metrics)
  state: TrainState
  batch: Batch
  compile_s: float  # of tracing, lowering and compiling the step


def compiled_step(model: ModelConfig, config: TrainConfig) -> CompiledStep:
  """On one device, with random parameters and tokens."""
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  started = time.perf_counter()
  step = make_program(model, config, mesh=mesh, total_steps=config.steps)
  compiled = step.lower().compile()
  compile_s = time.perf_counter() - started
  state = state_lib.place_initial(
    state_lib.InitialModel(
      params=decoder_lm.init_params(model, key=jax.random.key(0))
    ),
    optimizer=step.optimizer,
    like=step.state,
    balance_weights=initial_weights(config.loss, model),
  )
  batch = jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding),
    _batch(config, vocab_size=model.vocab_size),
    step.batch,
  )
  return CompiledStep(
    call=compiled, state=state, batch=batch, compile_s=compile_s
  )
