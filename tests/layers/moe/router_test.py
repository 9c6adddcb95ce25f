"""Logits of the router: normalised, with noise, with a bias beside them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.layers.moe import router
from aquila_jax.layers.moe.router import Router

X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)


def _apply(params=None, *, key=None, x=X, **fields) -> Any:
  moe = MoeConfig(num_experts=4, **fields)
  config = ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=6,
    mlp_dim=5,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    moe=moe,
  )
  rngs = None if key is None else {router.RNG: jax.random.key(key)}
  return Router(config, moe).apply(
    {"params": params or {"kernel": jnp.asarray(KERNEL)}},
    jnp.asarray(x),
    valid=jnp.ones(len(x), bool),
    rngs=rngs,
  )


def test_normalised_logits_have_the_given_deviation():
  found = _apply(logit_normalisation=1.5)
  np.testing.assert_allclose(found.plain, X @ KERNEL, rtol=1e-5)
  for z, row in zip(X.astype(float) @ KERNEL, found.logits, strict=True):
    expected = 1.5 * (z - z.mean()) / np.sqrt(((z - z.mean()) ** 2).mean())
    # 1e-6 is added to a variance near 1.
    np.testing.assert_allclose(row, expected, atol=1e-5)


def test_a_token_of_equal_logits_has_a_finite_gradient():
  def loss(kernel):
    return jnp.sum(_apply({"kernel": kernel}, logit_normalisation=1.0).logits)

  zeros = jnp.zeros((6, 4))
  np.testing.assert_array_equal(
    _apply({"kernel": zeros}, logit_normalisation=1.0).logits, 0
  )
  assert np.all(np.isfinite(jax.grad(loss)(zeros)))


def test_noise_is_of_the_given_size_and_of_training_only():
  """The plain logits of unit vectors are rows of the kernel times jitter."""
  x = np.tile(np.eye(6, dtype=np.float32), (200, 1))
  plain = np.tile(KERNEL, (200, 1))
  fields = dict(input_jitter=0.1, logit_noise=0.5)
  quiet = _apply(x=x, **fields)
  np.testing.assert_allclose(quiet.logits, plain, rtol=1e-6)

  found = _apply(x=x, key=0, **fields)
  factor = np.asarray(found.plain) / plain
  # One factor for all experts, since it is the input's.
  np.testing.assert_allclose(factor, factor[:, :1] * np.ones(4), rtol=1e-4)
  assert 0.9 <= factor.min() < 0.905 and 1.095 < factor.max() <= 1.1
  noise = np.asarray(found.logits - found.plain)
  # 4,800 draws: the deviation is known to 1%, the mean to 0.007.
  assert abs(noise.std() - 0.5) < 0.03 and abs(noise.mean()) < 0.03

  again, other = _apply(x=x, key=0, **fields), _apply(x=x, key=1, **fields)
  np.testing.assert_array_equal(again.logits, found.logits)
  assert np.all(np.asarray(other.logits) != found.logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_selection_bias_is_declared_as_what_it_is(dtype):
  moe = MoeConfig(num_experts=4, selection_bias=True)
  config = ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=6,
    mlp_dim=5,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    moe=moe,
    param_dtype=dtype,
  )
  boxed = Router(config, moe).init(
    jax.random.key(0), jnp.asarray(X), valid=jnp.ones(5, bool)
  )
  values, declared = axes.split_declared(boxed["params"])
  # Steps of 0.001 would be lost in half precision.
  assert values["selection_bias"].dtype == jnp.float32
  np.testing.assert_array_equal(values["selection_bias"], np.zeros(4))
  assert str(declared["selection_bias"]) == "writes expert"
  marks = {name: leaf.is_selection_bias for name, leaf in declared.items()}
  assert marks == {"kernel": False, "selection_bias": True}
