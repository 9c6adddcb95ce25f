from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes, neither, reads, writes
from aquila_jax.core.experiment_config import OptimizerConfig
from aquila_jax.core.moments import get_moments
from aquila_jax.training.optimizers import (
  is_matrix,
  learning_rate,
  make_optimizer,
)

_AXES = {
  "kernel": LeafAxes((neither("layer"), reads("embed"), writes("mlp"))),
  "bias": LeafAxes((neither("layer"), writes("kv_head"), writes("head_dim"))),
}


@pytest.mark.parametrize(
  "axes, expected",
  [
    ((reads("embed"), writes("mlp")), True),
    ((neither("expert"), reads("mlp"), writes("embed")), True),
    ((neither("vocab"), writes("embed")), True),
    ((reads("embed"), writes("vocab")), True),
    ((reads("embed"),), False),  # the final norm of a tied model
    ((neither("layer"), writes("embed")), False),
    ((neither("layer"), writes("kv_head"), writes("head_dim")), False),
  ],
)
def test_matrices_read_and_write_or_are_the_table(axes, expected):
  assert is_matrix(LeafAxes(axes)) is expected


def _adamw(config, params, gradients):
  """AdamW without its learning rate, written plainly, in float64."""
  mu = {k: np.zeros_like(v) for k, v in params.items()}
  nu = {k: np.zeros_like(v) for k, v in params.items()}
  updates = {}
  for count, grads in enumerate(gradients, start=1):
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    if config.clip_norm is not None and norm > config.clip_norm:
      grads = {k: g / norm * config.clip_norm for k, g in grads.items()}
    for key, g in grads.items():
      mu[key] = config.beta1 * mu[key] + (1 - config.beta1) * g
      nu[key] = config.beta2 * nu[key] + (1 - config.beta2) * g**2
      mean = mu[key] / (1 - config.beta1**count)
      variance = nu[key] / (1 - config.beta2**count)
      updates[key] = mean / (np.sqrt(variance) + config.epsilon)
      if key == "kernel" or config.decay_vectors:
        updates[key] = updates[key] + config.weight_decay * params[key]
  return updates


@pytest.mark.parametrize(
  "clip_norm, decay_vectors, fields",
  [
    (clip, vectors, fields)
    for clip, vectors, fields in itertools.product(
      (None, 1.0, 100.0),
      (False, True),
      (
        {},
        {"beta1": 0.5, "beta2": 0.7},
        {"epsilon": 0.1, "weight_decay": 0.0},
      ),
    )
  ],
)
def test_update_matches_plain_adamw(
  clip_norm, decay_vectors, fields: dict[str, Any]
):
  config = OptimizerConfig(
    learning_rate=1.0,
    clip_norm=clip_norm,
    decay_vectors=decay_vectors,
    **fields,
  )
  rng = np.random.default_rng(0)
  params = {
    "kernel": rng.normal(size=(2, 3, 4)),
    "bias": rng.normal(size=(2, 1, 3)),
  }
  gradients = [
    {k: rng.normal(size=v.shape) for k, v in params.items()} for _ in range(3)
  ]
  optimizer = make_optimizer(config, _AXES)
  narrow: Any = jax.tree.map(jnp.float32, params)
  state, updates = optimizer.init(narrow), {}
  for grads in gradients:
    moved: Any = optimizer.update(
      jax.tree.map(jnp.float32, grads), state, narrow
    )
    updates, state = moved
  expected = _adamw(config, params, gradients)
  for key in params:
    # Float32 through 3 steps of about 10 operations each.
    np.testing.assert_allclose(
      updates[key], expected[key], rtol=1e-5, atol=1e-6
    )
  assert int(get_moments(state).count) == 3


def _rates(config, total_steps):
  rate = learning_rate(config, total_steps)
  return [float(rate(jnp.int32(step))) for step in range(total_steps)]


def test_constant_after_warmup():
  config = OptimizerConfig(
    learning_rate=0.5, schedule="constant", warmup_steps=4
  )
  expected = [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
  assert _rates(config, 6) == expected


def test_warmup_of_zero_starts_at_the_peak():
  config = OptimizerConfig(learning_rate=0.5, schedule="constant")
  assert _rates(config, 3) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("warmup, final", [(0, 0.1), (3, 0.0), (10, 0.25)])
def test_cosine_follows_its_formula(warmup, final):
  config = OptimizerConfig(
    learning_rate=2.0, warmup_steps=warmup, final_ratio=final
  )
  expected = []
  for s in range(1, 11):
    if s <= warmup:
      expected.append(2.0 * s / warmup)
    else:
      cosine = np.cos(np.pi * (s - warmup) / (10 - warmup))
      expected.append(2.0 * (final + (1 - final) * (1 + cosine) / 2))
  np.testing.assert_allclose(_rates(config, 10), expected, rtol=1e-5, atol=1e-6)
  if warmup < 10:
    np.testing.assert_allclose(expected[-1], 2.0 * final, atol=1e-12)


def test_wsd_decays_over_its_share_at_the_end():
  config = OptimizerConfig(
    learning_rate=1.0,
    schedule="wsd",
    warmup_steps=2,
    decay_share=0.4,
    final_ratio=0.2,
  )
  # D = 4 of 10 steps: 1 - 0.8 * (1, 2, 3, 4) / 4.
  expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
  np.testing.assert_allclose(_rates(config, 10), expected, rtol=1e-6)


def test_wsd_decay_never_starts_within_the_warmup():
  config = OptimizerConfig(
    learning_rate=1.0, schedule="wsd", warmup_steps=2, decay_share=1.0
  )
  expected = [0.5, 1, 0.55, 0.1]  # D = 2: 1 - 0.9 * (1, 2) / 2
  np.testing.assert_allclose(_rates(config, 4), expected, rtol=1e-6)


def test_warmup_longer_than_the_stage_is_refused():
  config = OptimizerConfig(learning_rate=1.0, warmup_steps=11)
  with pytest.raises(errors.UserError) as error:
    learning_rate(config, 10, path="config.stages.a.train.optimizer")
  assert str(error.value) == (
    "config.stages.a.train.optimizer.warmup_steps=11: expected at most the"
    " steps of the stage, 10"
  )
