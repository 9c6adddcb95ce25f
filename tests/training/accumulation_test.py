"""Accumulation changes nothing: in float64, on one device and on eight."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.experiment_config import LossConfig, MeshConfig
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import batch_sharding, make_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import accumulation
from aquila_jax.training.accumulation import LossGradient

# Every term of the loss, the balance loss large enough to be seen.
LOSS = LossConfig(balance=1.0, router_z=0.1, lm_z=0.1, lm_max_z=0.1)
DTYPES: dict[str, Any] = dict(param_dtype="float64", compute_dtype="float64")


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def _model(tiny, **fields):
  moe = MoeConfig(num_experts=4, block_size=4, router_init_std=2.0, **fields)
  return tiny.model(moe=moe, vocab_size=32, mlp_dim=8, **DTYPES)


def _batch(tiny):
  """32 rows; with 4 microbatches row i is in microbatch i mod 4.

  The rows of a microbatch share half of the vocabulary, so that its load is far
  from the batch's, and rows differ in their padding.
  """
  batch = tiny.batch(0, rows=32)
  rows = np.arange(32)[:, None]
  tokens = batch.tokens % 8 + 8 * (rows % 4)
  segments = np.where(batch.segments == 2, 2 * (rows < 20), 1)
  segments = np.where(batch.segments == 0, 0, segments).astype(np.int32)
  return jax.tree.map(
    jnp.asarray,
    batch.replace(
      tokens=tokens.astype(np.int32),
      targets=np.roll(tokens, -1, axis=1).astype(np.int32),
      segments=segments,
      weights=batch.weights * (segments > 0),
    ),
  )


@functools.cache
def _params(model):
  init = functools.partial(decoder_lm.init_params, model)
  return jax.jit(init)(key=jax.random.key(0))


def _gradient(tiny, model, *, count, devices=1, **loss):
  """Gradients and terms of step 3, compiled for so many devices."""
  config = tiny.config(
    batch_size=32,
    num_microbatches=count,
    loss=dataclasses.replace(LOSS, **loss),
  )
  mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
  params = _params(model)
  axes = decoder_lm.parameter_axes(model)
  params = jax.device_put(params, param_shardings(axes, params, mesh))
  batch = jax.device_put(_batch(tiny), batch_sharding(mesh))
  gradient = LossGradient(config=config, model=model, num_languages=2)
  return jax.jit(gradient)(params, batch, step=jnp.int32(3))


@functools.cache
def _whole(tiny):
  """The batch in one piece, on one device."""
  with jax.enable_x64(True):
    return _gradient(tiny, _model(tiny), count=1)


def _close(found, expected):
  # 512 tokens through two layers: 1e-13 are some 500 roundings of sums of 1.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13),
    found,
    expected,
  )


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("devices", [1, 8])
def test_global_balance_is_the_batch_in_one_piece(tiny, devices):
  found = _gradient(tiny, _model(tiny), count=4, devices=devices)
  _close(found, _whole(tiny))


@pytest.mark.usefixtures("float64")
def test_a_cheap_rule_differs_in_the_balance_loss_alone(tiny):
  model = _model(tiny)
  _, found = _gradient(tiny, model, count=4, balance_over="running")
  _, whole = _whole(tiny)
  # Sorted by domain, microbatches look less even than the batch is.
  assert np.all(found.balance > whole.balance + 0.01)
  difference = jnp.mean(found.balance - whole.balance)
  _close(found.total, whole.total + difference)
  _close(
    found.replace(total=0.0, balance=0.0),
    whole.replace(total=0.0, balance=0.0),
  )


@pytest.mark.usefixtures("float64")
def test_noise_is_of_the_seed_the_step_the_layer_and_the_microbatch(tiny):
  """Routers alone: their key is all that the noise depends on."""
  keys = {
    (seed, step, number): accumulation._noise_key(
      seed, jnp.int32(step), jnp.int32(number)
    )
    for seed in (0, 2**62)
    for step in (0, 1)
    for number in (0, 1)
  }
  draws = {jax.random.normal(key).item() for key in keys.values()}
  assert len(draws) == len(keys)

  # Layers that are equal, of a residual that they leave alone: the load of each
  # differs by its noise.
  model = _model(tiny, logit_noise=3.0)
  params = _params(model)
  layers = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), params["layers"])
  for part, name in (("attention", "out_kernel"), ("mlp", "down_kernel")):
    layers[part][name] = jnp.zeros_like(layers[part][name])
  params = params | {"layers": layers}
  batch = _batch(tiny)

  def loads(**rngs):
    out: Any = jax.jit(functools.partial(decoder_lm.DecoderLM(model).apply))(
      {"params": params},
      batch.tokens,
      positions=batch.positions,
      segments=batch.segments,
      **rngs,
    )
    return np.asarray(out.routing.load)

  quiet = loads()
  np.testing.assert_array_equal(quiet[0], quiet[1])
  noisy = loads(rngs={"router": jax.random.key(1)})
  assert np.any(noisy[0] != noisy[1]) and np.all(noisy != quiet)
