"""The mixture against a loop over its experts, dropless and with capacity."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig, MoeConfig
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


def _chosen(x, params, top_k: int) -> list[list[int]]:
  """Each token's experts, best first, by sorting in Python."""
  logits = np.asarray(x[0] @ params["router"]["kernel"])
  return [
    sorted(range(NUM_EXPERTS), key=lambda e: -row[e])[:top_k] for row in logits
  ]


def _expert(x, params, e):
  gate = x @ params["gate_kernel"][e]
  hidden = gate / (1 + jnp.exp(-gate)) * (x @ params["up_kernel"][e])
  return hidden @ params["down_kernel"][e]


def _everything(token: int, choice: int) -> bool:
  del token, choice
  return True


def _loop(x, params, *, chosen, moe: MoeConfig | None, kept=_everything):
  """One token and one expert at a time; differentiable.

  Args:
    x: the tokens.
    params: of the layer.
    chosen: each token's experts.
    moe: order and renormalisation of the gates.
    kept: whether a token's choice found a slot.
  """
  assert moe is not None
  rows = []
  for token, experts in enumerate(chosen):
    logits = x[0, token] @ params["router"]["kernel"]
    among = logits[jnp.asarray(experts)]
    if moe.router_order == "topk_then_softmax":
      gates = jnp.exp(among) / jnp.sum(jnp.exp(among))
    else:
      gates = jnp.exp(among) / jnp.sum(jnp.exp(logits))
      if moe.renormalise:
        gates = gates / jnp.sum(gates)
    row = jnp.zeros(6)
    for choice, e in enumerate(experts):
      if SEGMENTS[0, token] > 0 and kept(token, choice):
        row += gates[choice] * _expert(x[0, token], params, e)
    rows.append(row)
  return jnp.stack(rows)[None]


def _assert_equal_with_gradients(fast, slow, *arguments):
  weights = jnp.asarray(
    np.random.default_rng(1).normal(size=arguments[0].shape), jnp.float32
  )

  def with_gradients(f):
    def loss(*arguments):
      out = f(*arguments)
      return jnp.sum(weights * out), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
      *arguments
    )

  (_, fast_out), fast_grads = with_gradients(fast)
  (_, slow_out), slow_grads = with_gradients(slow)
  # Sums of up to 6 * 5 * 9 products of size up to some tens:
  # 30 * sqrt(270) * 2^-24 = 3e-5.
  tolerance: dict[str, Any] = dict(rtol=0, atol=5e-5)
  np.testing.assert_allclose(fast_out, slow_out, **tolerance)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance),
    fast_grads,
    slow_grads,
  )


@pytest.mark.parametrize(
  ("order", "renormalise", "top_k", "block_size"),
  [
    *itertools.product(
      ["topk_then_softmax", "softmax_then_topk"], [True, False], [1, 2], [4]
    ),
    ("softmax_then_topk", False, 3, 1),
    ("softmax_then_topk", True, 4, 64),
  ],
)
def test_dropless_equals_a_loop_over_tokens_and_experts(
  order, renormalise, top_k, block_size
):
  config = _config(
    router_order=order,
    renormalise=renormalise,
    top_k=top_k,
    block_size=block_size,
  )
  x, params = _inputs()
  _assert_equal_with_gradients(
    lambda x, params: _apply(config, x, params)[0],
    functools.partial(_loop, chosen=_chosen(x, params, top_k), moe=config.moe),
    x,
    params,
  )


def _kept_by_counting(chosen, *, capacity: int) -> dict[tuple[int, int], bool]:
  """Which choices find a slot, first come first served."""
  used = [0] * NUM_EXPERTS
  kept = {}
  for token, experts in enumerate(chosen):
    for choice, e in enumerate(experts):
      if SEGMENTS[0, token] > 0:
        kept[token, choice] = used[e] < capacity
        used[e] += 1
  return kept


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.2, 0.4, 1.5])
def test_capacity_drops_what_a_loop_drops(top_k, factor):
  config = _config(capacity_factor=factor, top_k=top_k)
  x, params = _inputs()
  chosen = _chosen(x, params, top_k)
  capacity = math.ceil(factor * SEGMENTS.size * top_k / NUM_EXPERTS)
  kept = _kept_by_counting(chosen, capacity=capacity)
  _, stats = jax.jit(functools.partial(_apply, config))(x, params)
  dropped = sum(not found for found in kept.values())
  if factor < 1:
    assert dropped > 0
  np.testing.assert_allclose(stats.dropped, dropped / len(kept), rtol=1e-6)
  _assert_equal_with_gradients(
    lambda x, params: _apply(config, x, params)[0],
    functools.partial(
      _loop,
      chosen=chosen,
      moe=config.moe,
      kept=lambda token, choice: kept[token, choice],
    ),
    x,
    params,
  )


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
def test_permuting_the_experts_changes_nothing(capacity_factor):
  config = _config(capacity_factor=capacity_factor)
  x, params = _inputs()
  order = jnp.asarray([2, 0, 3, 1])
  permuted = {
    name: leaf[order] for name, leaf in params.items() if name != "router"
  }
  permuted["router"] = {"kernel": params["router"]["kernel"][:, order]}
  apply = jax.jit(functools.partial(_apply, config))
  out, stats = apply(x, params)
  permuted_out, permuted_stats = apply(x, permuted)
  np.testing.assert_allclose(permuted_out, out, atol=1e-5)
  np.testing.assert_allclose(permuted_stats.load, stats.load[order], rtol=1e-6)
  for name in ("balance_loss", "z_loss", "dropped"):
    np.testing.assert_allclose(
      getattr(permuted_stats, name), getattr(stats, name), rtol=1e-5
    )


def test_padding_gives_zeros_and_takes_no_slot():
  config = _config(capacity_factor=0.5)
  x, params = _inputs()
  apply = jax.jit(functools.partial(_apply, config))
  out, stats = apply(x, params)
  np.testing.assert_array_equal(out[:, SEGMENTS[0] == 0], 0)
  other = x.at[:, SEGMENTS[0] == 0].set(7.0)
  other_out, other_stats = apply(other, params)
  np.testing.assert_array_equal(other_out, out)
  jax.tree.map(np.testing.assert_array_equal, other_stats, stats)


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
  ]:
    out, _ = _apply(_config(**fields), x, equal)
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
  out, stats = _apply(config, x.astype(jnp.bfloat16), params)
  assert out.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {
    jnp.dtype("float32")
  }
