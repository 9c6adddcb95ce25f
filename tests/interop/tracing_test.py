"""A defect of one weight is found in its layer and part."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.interop import tracing
from aquila_jax.interop.tracing import Place
from aquila_jax.models import decoder_lm

DENSE = ModelConfig(
  vocab_size=23,
  num_layers=3,
  embed_dim=8,
  mlp_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  rope_theta=100.0,
  init_std=0.4,
  compute_dtype="float32",
)
TIED = dataclasses.replace(DENSE, tied_embeddings=True, qk_norm=True)
MIXTURE = dataclasses.replace(
  DENSE,
  remat="dots",
  moe=MoeConfig(
    num_experts=4, top_k=2, router_init_std=0.4, shared_expert_dim=6
  ),
)
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@functools.cache
def _params(config: ModelConfig):
  return jax.jit(functools.partial(decoder_lm.init_params, config))(
    key=jax.random.key(0)
  )


@functools.cache
def _trace(config: ModelConfig):
  return tracing.trace_model(config, _params(config), TOKENS)


def test_places_are_in_the_order_of_computing():
  assert [str(place) for place in tracing.places(2)] == [
    "embedding",
    "layer 0 attention",
    "layer 0 feed-forward",
    "layer 0 residual",
    "layer 1 attention",
    "layer 1 feed-forward",
    "layer 1 residual",
    "final norm",
    "logits",
  ]


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize(
  "config", [DENSE, TIED, MIXTURE], ids=["dense", "tied", "mixture"]
)
def test_trace_adds_up_to_the_model(config):
  trace = _trace(config)
  assert list(trace) == tracing.places(3)
  row = jnp.asarray(TOKENS)[None]
  out = decoder_lm.DecoderLM(config).apply(
    {"params": _params(config)},
    row,
    positions=jnp.arange(len(TOKENS))[None],
    segments=jnp.ones_like(row),
  )
  # Logits of a few units, some ten roundings of 6e-8 relative.
  np.testing.assert_allclose(
    trace[Place("logits")],
    out.logits[0],  # pyright: ignore[reportAttributeAccessIssue]
    atol=1e-5,
  )
  x = _params(config)["embedding"]["table"][jnp.asarray(TOKENS)]
  np.testing.assert_array_equal(trace[Place("embedding")], x)
  for i in range(3):
    x = x + trace[Place("attention", i)] + trace[Place("feed-forward", i)]
    np.testing.assert_allclose(trace[Place("residual", i)], x, atol=1e-5)
    x = trace[Place("residual", i)]


@pytest.mark.parametrize(
  "config", [DENSE, TIED, MIXTURE], ids=["dense", "tied", "mixture"]
)
def test_a_model_does_not_part_from_itself(config):
  found = tracing.compare_traces(
    config, _params(config), TOKENS, reference=_trace(config)
  )
  assert [one.place for one in found] == tracing.places(3)
  assert tracing.first_parted(found) is None
  assert all(one.total == 0 for one in found)
  # What a part adds on the same inputs is rounding: another program computes
  # it, with sums of up to 12 products.
  assert all(one.own < 64 * 2**-24 for one in found)


@pytest.mark.parametrize(
  ("config", "leaf", "index", "place"),
  [
    (DENSE, "embedding.table", (4, 2), Place("embedding")),
    (DENSE, "layers.attention.key_kernel", (1, 2, 0, 3), Place("attention", 1)),
    (DENSE, "layers.attention_norm.scale", (2, 5), Place("attention", 2)),
    (DENSE, "layers.mlp.up_kernel", (0, 7, 3), Place("feed-forward", 0)),
    (DENSE, "layers.mlp.down_kernel", (2, 3, 7), Place("feed-forward", 2)),
    (DENSE, "final_norm.scale", (3,), Place("final norm")),
    (DENSE, "lm_head.kernel", (1, 22), Place("logits")),
    (TIED, "layers.attention.query_norm.scale", (2, 1), Place("attention", 2)),
    (MIXTURE, "layers.mlp.router.kernel", (1, 4, 0), Place("feed-forward", 1)),
    (
      MIXTURE,
      "layers.mlp.gate_kernel",
      (2, 2, 4, 0),
      Place("feed-forward", 2),
    ),
    (
      MIXTURE,
      "layers.mlp.shared.down_kernel",
      (0, 1, 4),
      Place("feed-forward", 0),
    ),
  ],
)
def test_one_weight_that_differs_is_found(config, leaf, index, place):
  changed = _with_one_weight_changed(_params(config), leaf, index)
  reference = tracing.trace_model(config, changed, TOKENS)
  found = tracing.compare_traces(
    config, _params(config), TOKENS, reference=reference
  )
  assert tracing.first_parted(found) == place


def test_only_the_part_with_the_defect_differs_by_itself():
  """The difference of the whole stays, its own does not."""
  params = _params(DENSE)
  changed = _with_one_weight_changed(
    params, "layers.mlp.down_kernel", (1, 3, 7)
  )
  found = tracing.compare_traces(
    DENSE,
    params,
    TOKENS,
    reference=tracing.trace_model(DENSE, changed, TOKENS),
  )
  parted = [str(one.place) for one in found if one.parted]
  assert parted == ["layer 1 feed-forward", "layer 1 residual"]
  after = found[found.index(_at(found, Place("residual", 1))) :]
  assert all(one.total > 1e-4 for one in after)


def test_a_value_that_is_not_finite_parts():
  reference = dict(_trace(DENSE))
  broken = reference[Place("attention", 1)].copy()
  broken[2, 3] = np.nan
  reference[Place("attention", 1)] = broken
  found = tracing.compare_traces(
    DENSE, _params(DENSE), TOKENS, reference=reference
  )
  assert tracing.first_parted(found) == Place("attention", 1)


def test_relative_difference_is_the_largest_of_a_token():
  expected = np.array([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
  # |difference| / |expected|: 1 / 5, and 0.5 / 10.
  found = np.array([[3.0, 5.0], [0.0, 0.0], [6.3, 8.4]])
  assert tracing.relative_difference(found, expected) == pytest.approx(0.2)
  scale = np.array([10.0, 1.0, 2.0])  # 1 / 10, and 0.5 / 2
  assert tracing.relative_difference(
    found, expected, scale=scale
  ) == pytest.approx(0.25)


def test_rounding_limit_grows_with_the_positions():
  assert tracing.rounding_limit(0) == 2.0**-16
  assert tracing.rounding_limit(256) == 2.0**-15


def _at(found, place):
  return next(one for one in found if one.place == place)


def _with_one_weight_changed(params, leaf: str, index: tuple[int, ...]):
  """By a tenth of the weights' deviation."""
  names = leaf.split(".")

  def change(path, value):
    if [key.key for key in path] != names:
      return value
    return value.at[index].add(0.04)

  return jax.tree_util.tree_map_with_path(change, params)
