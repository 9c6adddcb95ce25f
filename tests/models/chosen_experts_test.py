"""The experts of tokens, and the load of groups of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.types import Batch
from aquila_jax.layers.moe import router
from aquila_jax.models import decoder_lm
from aquila_jax.models.chosen_experts import chosen_experts
from aquila_jax.models.decoder_lm import DecoderLM
from tests.models.mixed_layers_test import (
  EVERY_SECOND,
  LIST,
  POSITIONS,
  SEGMENTS,
  TOKENS,
  _params,
  _with_layers,
)

# Each token of one of three languages; of the last there is padding only.
LANGUAGES = np.array([[0, 1, 1, 0, 0, 2, 2], [1, 1, 1, 0, 0, 0, 1]])


def _batch() -> Batch:
  arrays = (TOKENS, TOKENS, np.ones(TOKENS.shape), SEGMENTS, POSITIONS)
  leaves: Any = [jnp.asarray(array) for array in (*arrays, LANGUAGES)]
  return Batch(*leaves)


def _layer_by_layer(config, params) -> np.ndarray:
  """As a list of layers says, each under a name of its own."""

  @jax.jit
  def captured(params):
    _, variables = DecoderLM(config, listed=True).apply(
      {"params": decoder_lm.list_layers(params, config)},
      jnp.asarray(TOKENS),
      positions=jnp.asarray(POSITIONS),
      segments=jnp.asarray(SEGMENTS),
      mutable=["intermediates"],
    )
    return variables["intermediates"]

  found: Any = captured(params)
  return np.stack(
    [found[f"layer_{i}"]["mlp"]["experts"][0] for i in config.moe_layers]
  )


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("config", [LIST, _with_layers("all")])
def test_experts_are_in_the_order_of_the_layers(config):
  params = _params(config)
  found = jax.jit(lambda params: chosen_experts(config, params, _batch())[0])
  ids = np.asarray(found(params))
  assert ids.shape == (len(config.moe_layers), 2, 7, 2)
  np.testing.assert_array_equal(ids, _layer_by_layer(config, params))
  assert (ids[:, SEGMENTS == 0] == -1).all()
  assert (ids[:, SEGMENTS > 0] >= 0).all()
  # Layers differ, so that another order would show.
  assert len({row.tobytes() for row in ids}) == len(ids)


def test_the_load_of_a_group_is_that_of_its_tokens():
  params, config = _params(EVERY_SECOND), EVERY_SECOND

  @jax.jit
  def routing(params):
    out: Any = DecoderLM(config).apply(
      {"params": params},
      jnp.asarray(TOKENS),
      positions=jnp.asarray(POSITIONS),
      segments=jnp.asarray(SEGMENTS),
      groups=jax.nn.one_hot(LANGUAGES, 3),
    )
    return out.routing

  stats = routing(params)
  ids = _layer_by_layer(config, params)
  found = np.asarray(stats.group_load)
  assert found.shape == (2, 3, 3)
  for layer in range(2):
    for language in range(3):
      chosen = ids[layer, (LANGUAGES == language) & (SEGMENTS > 0)]
      counts = np.bincount(chosen.reshape(-1), minlength=3)
      np.testing.assert_allclose(
        found[layer, language], counts / (12 * 2), rtol=1e-6
      )
  np.testing.assert_allclose(found.sum(1), stats.load, rtol=1e-6)
  assert not found[:, 2].any()


def test_every_layer_of_a_mixed_stack_has_noise_of_its_own():
  """With a router of zeros the noise alone chooses."""
  assert LIST.moe is not None
  moe = dataclasses.replace(LIST.moe, logit_noise=1.0)
  noisy = dataclasses.replace(LIST, moe=moe)
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: 0 * leaf if "router" in str(path) else leaf,
    _params(LIST),
  )

  @jax.jit
  def captured(key):
    _, variables = DecoderLM(noisy).apply(
      {"params": params},
      jnp.asarray(TOKENS),
      positions=jnp.asarray(POSITIONS),
      segments=jnp.asarray(SEGMENTS),
      rngs={router.RNG: key},
      mutable=["intermediates"],
    )
    return variables["intermediates"]

  def route(seed: int) -> np.ndarray:
    found: Any = captured(jax.random.key(seed))["layers"]
    runs = [found["run_0"]["block_1"], found["run_1"]["block_0"]]
    return np.concatenate([run["mlp"]["experts"][0] for run in runs])

  ids = route(0)
  assert len({layer.tobytes() for layer in ids}) == 4
  assert np.array_equal(ids, route(0))
  assert not np.array_equal(ids, route(1))
