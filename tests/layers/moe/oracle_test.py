"""Outputs and gradients against loops over tokens and experts, in float64.

The loops are NumPy's and take complex numbers. What they compute is analytic
but for the choice of experts, which is made of the real parts. So for a
direction v and a tiny h the imaginary part of f(x + i h v), over h, is the
derivative along v to the last digit, without a backward pass of ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.kernels.expert_ffn import api, reference
from aquila_jax.layers.moe.layer import MoeFeedForward

E, D, F, SHARED = 4, 6, 5, 3
# Two rows, 11 tokens, of which 3 are padding.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 2, 2, 0]], np.int32)
VALID = SEGMENTS.reshape(-1) > 0
H = 1e-30


@pytest.fixture(autouse=True)
def plainly(monkeypatch):
  """In float64, by the reference, which has no loops to compile."""
  monkeypatch.setattr(api, "platform_default", lambda _: "xla")
  assert api._BACKENDS["xla"] is reference.expert_ffn
  with jax.enable_x64(True):
    yield


def _config(**fields) -> ModelConfig:
  return ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=D,
    mlp_dim=F,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    param_dtype="float64",
    compute_dtype="float64",
    moe=MoeConfig(num_experts=E, block_size=4, **fields),
  )


def _inputs(moe: MoeConfig) -> dict[str, Any]:
  rng = np.random.default_rng(0)
  params: dict[str, Any] = {
    "router": {"kernel": rng.normal(size=(D, E))},
    "gate_kernel": rng.normal(size=(E, D, F)),
    "up_kernel": rng.normal(size=(E, D, F)),
    "down_kernel": rng.normal(size=(E, F, D)),
  }
  if moe.selection_bias:
    params["router"]["selection_bias"] = rng.normal(size=E)
  if moe.shared_expert_dim:
    params["shared"] = {
      "gate_kernel": rng.normal(size=(D, SHARED)),
      "up_kernel": rng.normal(size=(D, SHARED)),
      "down_kernel": rng.normal(size=(SHARED, D)),
      "token_gate_kernel": rng.normal(size=(D, 1)),
    }
  return {"params": params, "x": rng.normal(size=(*SEGMENTS.shape, D))}


def _sigmoid(z):
  return 1 / (1 + np.exp(-z))


def _swiglu(x, gate, up, down):
  z = x @ gate
  return (z * _sigmoid(z) * (x @ up)) @ down


def _logits(x, params, moe: MoeConfig):
  z = x @ params["router"]["kernel"]
  if moe.logit_normalisation is None:
    return z
  centred = z - np.sum(z) / E
  return (
    moe.logit_normalisation * centred / np.sqrt(np.sum(centred**2) / E + 1e-6)
  )


def _scores(logits, moe: MoeConfig):
  if moe.router_order == "sigmoid":
    return _sigmoid(logits)
  return np.exp(logits) / np.sum(np.exp(logits))


def _token_chooses(logits, params, moe: MoeConfig):
  """The experts of one token, best first, and their gates."""
  by_logits = moe.router_order == "topk_then_softmax"
  ranks = np.real(logits if by_logits else _scores(logits, moe))
  if moe.selection_bias:
    ranks = ranks + np.real(params["router"]["selection_bias"])
  experts = sorted(range(E), key=lambda e: -ranks[e])[: moe.top_k]
  gates = _scores(logits, moe)[experts]
  if by_logits or moe.renormalise:
    gates = gates / np.sum(gates)
  return experts, moe.gate_scale * gates


def _pairs(x, params, moe: MoeConfig):
  """(token, expert, gate, kept) of every meeting, one after the other."""
  if moe.choice == "expert":
    yield from _pairs_of_experts(x, params, moe)
    return
  capacity = math.inf
  if moe.capacity_factor is not None:
    capacity = math.ceil(moe.capacity_factor * len(x) * moe.top_k / E)
  used = [0] * E
  for token, row in enumerate(x):
    if not VALID[token]:
      continue
    experts, gates = _token_chooses(_logits(row, params, moe), params, moe)
    for e, gate in zip(experts, gates, strict=True):
      yield token, e, gate, used[e] < capacity
      used[e] += 1


def _pairs_of_experts(x, params, moe: MoeConfig):
  scores = {
    token: _scores(_logits(row, params, moe), moe)
    for token, row in enumerate(x)
    if VALID[token]
  }
  for e in range(E):
    best = sorted(scores, key=lambda token: -np.real(scores[token][e]))
    for token in best[: math.ceil(moe.top_k * len(x) / E)]:
      yield token, e, moe.gate_scale * scores[token][e], True


def _loop(inputs, moe: MoeConfig):
  params, x = inputs["params"], inputs["x"].reshape(-1, D)
  out = np.zeros(x.shape, complex)
  for token, e, gate, kept in _pairs(x, params, moe):
    if kept:
      kernels = (params[f"{name}_kernel"][e] for name in ("gate", "up", "down"))
      out[token] += gate * _swiglu(x[token], *kernels)
  if moe.shared_expert_dim:
    shared = params["shared"]
    kernels = [shared[f"{name}_kernel"] for name in ("gate", "up", "down")]
    for token in np.flatnonzero(VALID):
      share = _sigmoid(x[token] @ shared["token_gate_kernel"][:, 0])
      out[token] += share * _swiglu(x[token], *kernels)
  return out.reshape(inputs["x"].shape)


def _apply(inputs, config: ModelConfig) -> Any:
  return MoeFeedForward(config).apply(
    {"params": inputs["params"]}, inputs["x"], segments=jnp.asarray(SEGMENTS)
  )


def _check(config: ModelConfig):
  moe = config.moe
  assert moe is not None
  inputs = _inputs(moe)
  upstream = np.random.default_rng(1).normal(size=inputs["x"].shape)

  def loss(inputs):
    out = _apply(inputs, config)[0]
    return jnp.sum(upstream * out), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(inputs)
  # Three products of up to 7 * 6 terms of some tens: 1e-13 is 40 roundings of
  # the largest.
  close: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(out, np.real(_loop(inputs, moe)), **close)

  leaves, structure = jax.tree.flatten(inputs)
  rng = np.random.default_rng(2)
  for i, grad in enumerate(jax.tree.leaves(grads)):
    for _ in range(2):
      direction = rng.normal(size=leaves[i].shape)
      moved = list(leaves)
      moved[i] = leaves[i] + 1j * H * direction
      value = np.sum(upstream * _loop(structure.unflatten(moved), moe))
      np.testing.assert_allclose(
        np.sum(np.asarray(grad) * direction), np.imag(value) / H, **close
      )


ORDERS: list[dict[str, Any]] = [
  dict(router_order="topk_then_softmax"),
  dict(router_order="softmax_then_topk"),
  dict(router_order="softmax_then_topk", renormalise=False),
  dict(router_order="sigmoid"),
  dict(router_order="sigmoid", renormalise=False),
]


def test_by_the_kernel_of_the_platform(monkeypatch):
  monkeypatch.undo()
  _check(_config(**ORDERS[3], capacity_factor=0.6))


def _named(fields: dict[str, Any]) -> str:
  return "-".join(f"{name}={value}" for name, value in fields.items())


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("order", ORDERS, ids=_named)
@pytest.mark.parametrize(
  ("top_k", "capacity_factor", "shared"),
  list(itertools.product([1, 3], [None, 0.6], [0, SHARED])),
)
def test_tokens_choose_as_in_a_loop(order, top_k, capacity_factor, shared):
  fields = dict(top_k=top_k, capacity_factor=capacity_factor)
  _check(_config(shared_expert_dim=shared, **fields, **order))


@pytest.mark.parametrize("order", ORDERS, ids=_named)
@pytest.mark.parametrize(
  "more",
  [
    dict(gate_scale=2.5, selection_bias=True, top_k=3, capacity_factor=0.6),
    dict(logit_normalisation=1.5, top_k=3),
  ],
  ids=_named,
)
def test_a_bias_a_scale_and_normal_logits_do_as_in_a_loop(order, more):
  _check(_config(**order, **more))


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize(
  "order",
  [ORDERS[2], ORDERS[4], ORDERS[4] | dict(gate_scale=2.0)],
  ids=_named,
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_choose_as_in_a_loop(order, top_k):
  _check(_config(choice="expert", top_k=top_k, **order))


def _stats_of_a_loop(inputs, moe: MoeConfig) -> dict[str, Any]:
  params, x = inputs["params"], inputs["x"].reshape(-1, D)
  met = np.zeros((len(x), E))
  gates, lost = np.zeros(len(x)), 0
  for token, e, gate, kept in _pairs(x, params, moe):
    met[token, e] = 1
    gates[token] = max(gates[token], gate)
    lost += not kept
  rows = np.arange(len(x)) // SEGMENTS.shape[1]
  p, z, sequences = np.zeros((len(x), E)), 0.0, 0.0
  for token in np.flatnonzero(VALID):
    scores = _scores(_logits(x[token], params, moe), moe)
    p[token] = scores / np.sum(scores)
    plain = x[token] @ params["router"]["kernel"]
    z += np.log(np.sum(np.exp(plain))) ** 2
  for row in range(len(SEGMENTS)):
    here = (rows == row) & VALID
    f, mean = met[here].sum(axis=0) / met[here].sum(), p[here].mean(axis=0)
    sequences += here.sum() * E * np.sum(f * mean)
  alone = np.sum(VALID & ~met.any(axis=1)) / VALID.sum()
  return {
    "load": met.sum(axis=0) / met.sum(),
    "probability": p[VALID].mean(axis=0),
    "sequence_balance": sequences / VALID.sum(),
    "z_loss": z / VALID.sum(),
    "entropy": -np.sum(p[VALID] * np.log(p[VALID])) / VALID.sum(),
    "top_gate": gates[VALID].mean(),
    "dropped": alone if moe.choice == "expert" else lost / met.sum(),
  }


@pytest.mark.parametrize(
  "fields",
  [
    dict(capacity_factor=0.6),
    dict(router_order="softmax_then_topk", renormalise=False),
    dict(router_order="sigmoid", selection_bias=True, gate_scale=2.0, top_k=3),
    dict(logit_normalisation=2.0),
    dict(choice="expert", router_order="sigmoid", renormalise=False, top_k=1),
  ],
  ids=_named,
)
def test_statistics_are_those_of_a_loop(fields):
  config = _config(**fields)
  assert config.moe is not None
  inputs = _inputs(config.moe)
  # A token that suits no expert.
  inputs["x"][0, 0] = -5 * inputs["params"]["router"]["kernel"].sum(axis=1)
  _, stats = jax.jit(_apply, static_argnums=1)(inputs, config)
  expected = _stats_of_a_loop(inputs, config.moe)
  assert stats.group_load is None  # no groups: chosen_experts_test.py
  expected["group_load"] = None
  assert set(expected) == {field.name for field in dataclasses.fields(stats)}
  del expected["group_load"]
  for name, value in expected.items():
    np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-12)
  if config.moe.capacity_factor or config.moe.choice == "expert":
    assert expected["dropped"] > 0
