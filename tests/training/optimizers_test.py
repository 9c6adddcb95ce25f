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
  update = jax.jit(optimizer.update)
  state, updates = jax.jit(optimizer.init)(narrow), {}
  for grads in gradients:
    moved: Any = update(jax.tree.map(jnp.float32, grads), state, narrow)
    updates, state = moved
  expected = _adamw(config, params, gradients)
  for key in params:
    # Float32 through 3 steps of about 10 operations each.
    np.testing.assert_allclose(
      updates[key], expected[key], rtol=1e-5, atol=1e-6
    )
  assert int(get_moments(state).count) == 3


def test_a_selection_bias_is_never_decayed():
  axes = {
    "bias": LeafAxes((writes("expert"),), is_selection_bias=True),
    "other": LeafAxes((writes("expert"),)),
  }
  config = OptimizerConfig(learning_rate=1.0, decay_vectors=True)
  optimizer = make_optimizer(config, axes)
  params: Any = {name: jnp.ones(4) for name in axes}
  nothing = jax.tree.map(jnp.zeros_like, params)
  updates: Any = optimizer.update(nothing, optimizer.init(params), params)[0]
  np.testing.assert_array_equal(updates["bias"], 0)
  np.testing.assert_allclose(updates["other"], 0.1)


_GROWN_AXES = {
  "gate": LeafAxes(
    (neither("layer"), neither("expert"), reads("embed"), writes("mlp"))
  ),
  "out": LeafAxes((reads("kv_head"), reads("q_per_kv"), writes("embed"))),
  "scale": LeafAxes((writes("embed"),)),
  "tied_scale": LeafAxes((reads("embed"),)),
  "router": LeafAxes((reads("embed"), writes("expert"))),
  "rest": LeafAxes((neither("vocab"), writes("head_dim"))),
}
_COPIES = {
  "embed": np.array([2, 2, 2, 2]),
  "mlp": np.array([2, 1, 2]),
  "kv_head": np.array([1, 1]),
  "q_per_kv": np.array([3, 3, 3]),
}
# By hand: C_read and C_write of every leaf.
_READ = {
  "gate": 2.0,
  "out": 3.0,
  "scale": 1.0,
  "tied_scale": 2.0,
  "router": 2.0,
  "rest": 1.0,
}
_WRITTEN = {
  "gate": np.array([2.0, 1.0, 2.0]),
  "out": 2.0,
  "scale": 2.0,
  "tied_scale": 1.0,
  "router": 1.0,
  "rest": 1.0,
}


def test_function_space_follows_its_formula():
  config = OptimizerConfig(
    learning_rate=1.0,
    growth_lr="function_space",
    clip_norm=None,
    weight_decay=0.0,
    epsilon=0.5,
  )
  sizes = dict(
    layer=2,
    expert=3,
    embed=4,
    mlp=3,
    kv_head=2,
    q_per_kv=3,
    vocab=5,
    head_dim=2,
  )
  rng = np.random.default_rng(0)
  gradients = [
    {
      key: rng.normal(size=[sizes[name] for name in leaf.names])
      for key, leaf in _GROWN_AXES.items()
    }
    for _ in range(2)
  ]
  optimizer = make_optimizer(config, _GROWN_AXES, copies=_COPIES)
  params: Any = jax.tree.map(jnp.float32, gradients[0])
  update = jax.jit(optimizer.update)
  state, updates = jax.jit(optimizer.init)(params), {}
  for grads in gradients:
    moved: Any = update(jax.tree.map(jnp.float32, grads), state, params)
    updates, state = moved
  first, second = gradients
  b, c = config.beta1, config.beta2
  for key in _GROWN_AXES:
    mu = (1 - b) * (b * first[key] + second[key])
    nu = (1 - c) * (c * first[key] ** 2 + second[key] ** 2)
    root = np.sqrt(nu / (1 - c**2)) + 0.5 / _WRITTEN[key]
    expected = mu / (1 - b**2) / root / _READ[key]
    # Float32 through about ten operations.
    np.testing.assert_allclose(updates[key], expected, rtol=1e-5, atol=1e-7)
  assert int(get_moments(state).count) == 2


def _program(config, copies):
  """The jaxpr of an update, and the bytes of its largest constant."""
  optimizer = make_optimizer(config, _AXES, copies=copies)
  params: Any = {"kernel": jnp.ones((2, 64, 96)), "bias": jnp.ones((2, 1, 3))}
  traced = jax.make_jaxpr(optimizer.update)(
    params, optimizer.init(params), params
  )
  return str(traced), max([0, *(c.nbytes for c in traced.consts)])


def test_plain_is_the_same_program_with_and_without_copies():
  config = OptimizerConfig(learning_rate=1.0)
  copies = {"embed": np.full(64, 2), "mlp": np.full(96, 2)}
  assert _program(config, copies) == _program(config, None)


def test_copies_are_vectors_in_the_program():
  config = OptimizerConfig(learning_rate=1.0, growth_lr="function_space")
  copies = {"embed": np.full(64, 2), "mlp": np.full(96, 2)}
  text, largest = _program(config, copies)
  assert "f32[1,64,1]" in text and "f32[1,1,96]" in text
  assert largest <= 96 * 8


def test_without_copies_the_update_is_adams_to_the_bit():
  """A growth of depth alone: all counts are one."""
  params: Any = {
    key: jnp.sin(jnp.arange(6.0)).reshape(2, 1, 3) for key in _AXES
  }

  def update(**fields):
    config = OptimizerConfig(learning_rate=1.0, **fields)
    optimizer = make_optimizer(config, _AXES, copies={"mlp": np.ones(3, int)})
    return optimizer.update(params, optimizer.init(params), params)[0]

  jax.tree.map(
    np.testing.assert_array_equal, update(), update(growth_lr="function_space")
  )


def test_function_space_without_growth_is_refused():
  config = OptimizerConfig(learning_rate=1.0, growth_lr="function_space")
  with pytest.raises(errors.UserError) as error:
    make_optimizer(config, _AXES, path="config.stages.a.train.optimizer")
  assert str(error.value) == (
    "config.stages.a.train.optimizer.growth_lr='function_space': expected a"
    " model that was grown by copying; its lineage has no scale_up, or the last"
    " one has no copies (method='random', or an earlier version of this"
    " package)"
  )


def _rates(config, total_steps, **fields):
  rate = learning_rate(config, total_steps, **fields)
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


def _continued(continuation, schedule, **fields):
  return OptimizerConfig(
    learning_rate=1.0,
    schedule=schedule,
    warmup_steps=3,
    continuation=continuation,
    **fields,
  )


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("continuation", ["rewarm", "restart", "keep"])
def test_from_scratch_every_continuation_is_the_same(schedule, continuation):
  config = _continued(continuation, schedule)
  expected = _rates(_continued("rewarm", schedule), 8)
  assert _rates(config, 8) == expected
  assert expected[:2] == [np.float32(1 / 3), np.float32(2 / 3)]


@pytest.mark.parametrize("trained_steps", [0, 5])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_rewarm_forgets_what_was_before(schedule, trained_steps):
  config = _continued("rewarm", schedule)
  rates = _rates(config, 8, trained_steps=trained_steps)
  assert rates == _rates(config, 8)


@pytest.mark.parametrize("trained_steps", [0, 5])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_restart_leaves_the_warmup_out(schedule, trained_steps):
  config = _continued("restart", schedule)
  rates = _rates(config, 8, trained_steps=trained_steps)
  without = OptimizerConfig(learning_rate=1.0, schedule=schedule)
  assert rates == _rates(without, 8)
  # Nor need it fit into the stage.
  assert len(_rates(config, 2, trained_steps=trained_steps)) == 2


@pytest.mark.parametrize("trained_steps", [0, 2, 5])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_keep_is_the_end_of_one_schedule_over_all_steps(
  schedule, trained_steps
):
  config = _continued("keep", schedule, decay_share=0.5)
  whole = _rates(_continued("rewarm", schedule, decay_share=0.5), 8)
  rest = _rates(config, 8 - trained_steps, trained_steps=trained_steps)
  assert rest == whole[trained_steps:]


def test_a_warmup_longer_than_all_steps_is_refused():
  config = _continued("keep", "cosine")
  learning_rate(config, 1, trained_steps=2)
  with pytest.raises(errors.UserError) as error:
    learning_rate(config, 1, trained_steps=1)
  assert str(error.value) == (
    "config.optimizer.warmup_steps=3: expected at most the steps of the stage"
    " and the 1 before it, 2"
  )
