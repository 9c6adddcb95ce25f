"""Adam's moments are found by their type, wherever optax puts them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from aquila_jax.core.moments import AdamMoments, get_moments, set_moments

PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2))}}


def _optimizer() -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.scale_by_adam(), {"a": True, "b": {"c": True}}),
    optax.add_decayed_weights(0.1),
  )


def test_moments_are_those_of_the_update():
  optimizer = _optimizer()
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  with jax.numpy_dtype_promotion("standard"):  # optax raises float to int
    state = jax.jit(optimizer.init)(PARAMS)
    _, state = jax.jit(optimizer.update)(grads, state, PARAMS)
  moments = get_moments(state)
  clipped = 7**-0.5  # 7 entries of 1, clipped to a norm of 1
  assert moments.count == 1
  assert jnp.allclose(moments.mu["a"], 0.1 * clipped, rtol=1e-6)
  assert jnp.allclose(moments.nu["b"]["c"], 0.001 * clipped**2, rtol=1e-4)


def test_set_moments_replaces_them_and_nothing_else():
  state = _optimizer().init(PARAMS)
  moments = AdamMoments(
    count=jnp.asarray(5),
    mu=jax.tree.map(lambda x: x + 1, PARAMS),
    nu=jax.tree.map(lambda x: x + 2, PARAMS),
  )
  changed = set_moments(state, moments)
  assert jax.tree.structure(changed) == jax.tree.structure(state)
  assert get_moments(changed).count == 5
  assert get_moments(changed).mu is moments.mu
  assert get_moments(changed).nu is moments.nu


def test_state_without_adam_is_refused():
  state = optax.sgd(0.1, momentum=0.9).init(PARAMS)
  with pytest.raises(AssertionError) as error:
    get_moments(state)
  assert str(error.value) == "0 ScaleByAdamState in the state"
