"""Properties of the mixture; oracle_test.py has its values and gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.kernels.topk_routing import api
from aquila_jax.kernels.topk_routing.pallas_tpu import PallasTpu
from aquila_jax.layers.moe.layer import MoeFeedForward

NUM_EXPERTS = 4
# 9 tokens, of which 2 are padding: no multiple of the block sizes.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 3, 0, 0]], np.int32)


def _config(**fields) -> ModelConfig:
  return ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=6,
    mlp_dim=5,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    compute_dtype="float32",
    moe=MoeConfig(num_experts=NUM_EXPERTS, **fields),
  )


def _inputs():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {
    "router": {"kernel": normal(6, NUM_EXPERTS)},
    "gate_kernel": normal(NUM_EXPERTS, 6, 5),
    "up_kernel": normal(NUM_EXPERTS, 6, 5),
    "down_kernel": normal(NUM_EXPERTS, 5, 6),
  }
  return normal(1, SEGMENTS.size, 6), params


def _apply(config: ModelConfig, x, params) -> Any:
  return MoeFeedForward(config).apply(
    {"params": params}, x, segments=jnp.asarray(SEGMENTS)
  )


def _compiled(config: ModelConfig) -> Any:
  return jax.jit(functools.partial(_apply, config))


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_permuting_the_experts_changes_nothing(capacity_factor):
  config = _config(capacity_factor=capacity_factor)
  x, params = _inputs()
  order = jnp.asarray([2, 0, 3, 1])
  permuted = {
    name: leaf[order] for name, leaf in params.items() if name != "router"
  }
  permuted["router"] = {"kernel": params["router"]["kernel"][:, order]}
  apply = _compiled(config)
  out, stats = apply(x, params)
  permuted_out, permuted_stats = apply(x, permuted)
  np.testing.assert_allclose(permuted_out, out, atol=1e-5)
  np.testing.assert_allclose(permuted_stats.load, stats.load[order], rtol=1e-6)
  names = ("balance_loss", "z_loss", "dropped", "entropy", "top_gate")
  for name in (*names, "sequence_balance"):
    np.testing.assert_allclose(
      getattr(permuted_stats, name), getattr(stats, name), rtol=1e-5
    )


# Of every way to choose: nothing that follows may see padding.
WAYS: dict[str, dict[str, Any]] = {
  "capacity": dict(capacity_factor=0.5),
  "sigmoid, bias": dict(router_order="sigmoid", selection_bias=True),
  "groups": dict(num_groups=2, logit_normalisation=1.0),
  "expert choice": dict(
    choice="expert", router_order="softmax_then_topk", renormalise=False
  ),
}


@pytest.mark.parametrize("way", WAYS)
def test_padding_gives_zeros_and_takes_no_slot(way):
  config = _config(**WAYS[way])
  x, params = _inputs()
  if config.moe is not None and config.moe.selection_bias:
    bias = jnp.asarray([0.3, 0.0, -0.3, 0.0])
    params["router"]["selection_bias"] = bias
  apply = _compiled(config)
  out, stats = apply(x, params)
  np.testing.assert_array_equal(out[:, SEGMENTS[0] == 0], 0)
  other = x.at[:, SEGMENTS[0] == 0].set(7.0)
  other_out, other_stats = apply(other, params)
  np.testing.assert_array_equal(other_out, out)
  jax.tree.map(np.testing.assert_array_equal, other_stats, stats)


def test_chosen_experts_are_there_for_who_asks():
  x, params = _inputs()

  def collected(**fields) -> tuple[np.ndarray, Any]:
    apply: Any = functools.partial(
      MoeFeedForward(_config(**fields)).apply, mutable=["intermediates"]
    )
    (_, stats), variables = jax.jit(apply)(
      {"params": params}, x, segments=jnp.asarray(SEGMENTS)
    )
    (ids,) = variables["intermediates"]["experts"]
    return np.asarray(ids), stats

  ids, stats = collected()
  assert ids.shape == (1, 9, 2)
  logits = np.asarray(x[0] @ params["router"]["kernel"])
  for token, row in enumerate(logits):
    expected = np.argsort(-row)[:2] if SEGMENTS[0, token] else [-1, -1]
    assert ids[0, token].tolist() == list(expected)
  counts = np.bincount(ids[ids >= 0], minlength=4)
  np.testing.assert_allclose(stats.load, counts / counts.sum(), rtol=1e-6)

  # ceil(2 * 9 / 4) = 5 tokens an expert; a place for each expert.
  ids, _ = collected(**WAYS["expert choice"])
  assert ids.shape == (1, 9, 4)
  assert np.all((ids == -1) | (ids == np.arange(4)))
  assert (ids >= 0).sum(axis=(0, 1)).tolist() == [5] * 4
  assert np.all(ids[0, 7:] == -1)


def _expert(x, params, e):
  gate = x @ params["gate_kernel"][e]
  hidden = gate / (1 + jnp.exp(-gate)) * (x @ params["up_kernel"][e])
  return hidden @ params["down_kernel"][e]


def test_equal_experts_are_the_dense_ffn_when_the_gates_sum_to_one():
  x, params = _inputs()
  equal = {
    name: jnp.broadcast_to(leaf[:1], leaf.shape)
    for name, leaf in params.items()
    if name != "router"
  } | {"router": params["router"]}
  dense = jax.vmap(lambda row: _expert(row, params, 0))(x[0])
  valid = SEGMENTS[0] > 0
  for fields, exact in [
    (dict(router_order="topk_then_softmax"), True),
    (dict(router_order="softmax_then_topk", renormalise=True), True),
    (dict(router_order="softmax_then_topk", renormalise=False), False),
    (dict(router_order="sigmoid"), True),
    (dict(router_order="sigmoid", gate_scale=2.5), False),
    # Whatever the choice is.
    (dict(num_groups=2), True),
    (dict(logit_normalisation=2.0), True),
  ]:
    out, _ = _compiled(_config(**fields))(x, equal)
    close = np.allclose(out[0, valid], dense[valid], atol=1e-5)
    assert close == exact, fields


def test_axes_are_the_dense_ffns_with_expert_in_front():
  x, _ = _inputs()
  layer = MoeFeedForward(_config())
  _, declared = axes.split_declared(
    jax.eval_shape(
      functools.partial(layer.init, segments=jnp.asarray(SEGMENTS)),
      jax.random.key(0),
      x,
    )
  )
  flat = jax.tree.leaves_with_path(declared["params"])
  assert {axes.path_name(path): str(leaf) for path, leaf in flat} == {
    "router/kernel": "reads embed, writes expert",
    "gate_kernel": "neither expert, reads embed, writes mlp",
    "up_kernel": "neither expert, reads embed, writes mlp",
    "down_kernel": "neither expert, reads mlp, writes embed",
  }


def test_router_of_half_precision_is_float32():
  config = dataclasses.replace(_config(), compute_dtype="bfloat16")
  x, params = _inputs()
  apply = _compiled(config)
  out, stats = apply(x.astype(jnp.bfloat16), params)
  assert out.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {
    jnp.dtype("float32")
  }


def test_the_routing_kernel_changes_no_loss(monkeypatch):
  """And `use_routing_kernel` switches it off."""
  kernel = PallasTpu(device_kind="TPU v6 lite", interpret=True)
  monkeypatch.setattr(api, "platform_default", lambda: "pallas_tpu")
  monkeypatch.setitem(api._BACKENDS, "pallas_tpu", kernel)
  x, params = _inputs()
  outputs = {}
  for wanted in (True, False):
    config = _config(use_routing_kernel=wanted)

    def loss(x, params, config=config):
      out, stats = _apply(config, x, params)
      total = jnp.sum(out**2) + stats.balance_loss + 0.1 * stats.z_loss
      return total, stats

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    assert ("pallas_call" in str(jax.make_jaxpr(both)(x, params))) == wanted
    outputs[wanted] = jax.jit(both)(x, params)
  # float32; sums of some ten products.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    outputs[True],
    outputs[False],
  )
