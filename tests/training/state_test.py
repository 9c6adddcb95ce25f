from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.experiment_config import MeshConfig, OptimizerConfig
from aquila_jax.core.moments import AdamMoments, get_moments
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import state as state_lib
from aquila_jax.training.optimizers import make_optimizer


@pytest.fixture(scope="module")
def made(tiny):
  """Model, parameters, axes, optimizer."""
  model = tiny.moe()
  axes = decoder_lm.parameter_axes(model)
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0), axes)
  return model, tiny.params(model), axes, optimizer


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_fresh_state_has_zero_moments_and_no_average(made):
  _, params, _, optimizer = made
  state = state_lib.create_state(params, optimizer=optimizer)
  moments = get_moments(state.opt_state)
  assert state.ema is None
  assert (int(state.step), int(moments.count)) == (0, 0)
  _equal(state.params, params)
  for leaf in jax.tree.leaves((moments.mu, moments.nu)):
    assert not leaf.any()


def test_given_moments_and_average_are_taken(made):
  _, params, _, optimizer = made
  ones = jax.tree.map(jnp.ones_like, params)
  moments = AdamMoments(count=jnp.int32(7), mu=ones, nu=params)
  state = state_lib.create_state(
    params, optimizer=optimizer, keep_ema=True, moments=moments, ema=ones
  )
  _equal(get_moments(state.opt_state), moments)
  _equal(state.ema, ones)
  assert int(state.step) == 0


def test_the_average_starts_at_the_parameters(made):
  _, params, _, optimizer = made
  state = state_lib.create_state(params, optimizer=optimizer, keep_ema=True)
  _equal(state.ema, params)


def test_moments_and_average_of_half_precision_are_float32(made):
  _, params, _, optimizer = made
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  state = state_lib.create_state(half, optimizer=optimizer, keep_ema=True)
  moments = get_moments(state.opt_state)
  for leaf in jax.tree.leaves((moments.mu, moments.nu, state.ema)):
    assert leaf.dtype == jnp.float32
  for leaf in jax.tree.leaves(state.params):
    assert leaf.dtype == jnp.bfloat16


def test_everything_lies_where_its_parameter_lies(made):
  model, _, axes, optimizer = made
  mesh = make_mesh(MeshConfig(data=4, fsdp=2))
  shapes = decoder_lm.abstract_params(model)
  expected = param_shardings(axes, shapes, mesh)
  state = state_lib.abstract_state(
    shapes, optimizer=optimizer, axes=axes, mesh=mesh, keep_ema=True
  )
  moments = get_moments(state.opt_state)
  for tree in (state.params, moments.mu, moments.nu, state.ema):
    found = jax.tree.map(lambda leaf: leaf.sharding, tree)
    assert found == expected
  assert any(not s.is_fully_replicated for s in jax.tree.leaves(expected))
  assert state.step.sharding.is_fully_replicated
  assert moments.count.sharding.is_fully_replicated


def test_placing_copies_the_initial_model(made):
  model, params, axes, optimizer = made
  like = state_lib.abstract_state(
    decoder_lm.abstract_params(model),
    optimizer=optimizer,
    axes=axes,
    mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]),
    keep_ema=True,
  )
  initial = state_lib.InitialModel(params=params)
  state = state_lib.place_initial(initial, optimizer=optimizer, like=like)
  _equal(state.params, params)
  # Every buffer stands alone, so the state can be donated.
  pointers = [
    leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, params))
  ]
  assert len(set(pointers)) == len(pointers)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
