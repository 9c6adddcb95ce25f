"""The shared expert alone, and beside those that a router chooses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.layers.moe.layer import MoeFeedForward
from aquila_jax.layers.moe.shared_expert import SharedExpert

# 7 tokens, of which 2 are padding.
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0, 0]], np.int32)


def _config(**fields: Any) -> ModelConfig:
  return ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=6,
    mlp_dim=5,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    compute_dtype="float32",
    moe=MoeConfig(num_experts=3, block_size=4, **fields),
  )


def _normal(seed: int, *shape: int) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _shared_params(gate: bool) -> dict[str, jax.Array]:
  params = {
    "gate_kernel": _normal(1, 6, 4),
    "up_kernel": _normal(2, 6, 4),
    "down_kernel": _normal(3, 4, 6),
  }
  return params | ({"token_gate_kernel": _normal(4, 6, 1)} if gate else {})


def _token_by_token(params, x):
  """[M, D], in scalars of a token's own."""
  rows = []
  for row in x:
    gate = row @ params["gate_kernel"]
    hidden = gate / (1 + jnp.exp(-gate)) * (row @ params["up_kernel"])
    out = hidden @ params["down_kernel"]
    if "token_gate_kernel" in params:
      share = row @ params["token_gate_kernel"][:, 0]
      out = out / (1 + jnp.exp(-share))
    rows.append(out)
  return jnp.stack(rows)


def _outputs_and_gradients(f, *arguments):
  weights = _normal(9, *arguments[-1].shape)

  def loss(*arguments):
    out = f(*arguments)
    return jnp.sum(weights * out), out

  return jax.jit(
    jax.value_and_grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
  )(*arguments)


def _assert_close(found, expected):
  # Three products of at most 7 * 6 numbers of up to some tens: 3 * sqrt(42) *
  # 2^-24 * 40 = 5e-5.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5),
    found,
    expected,
  )


@pytest.mark.parametrize("gate", [True, False])
def test_output_and_gradients_equal_a_loop_over_tokens(gate):
  layer = SharedExpert(_config(shared_expert_dim=4, shared_expert_gate=gate))

  def fast(params, x) -> Any:
    return layer.apply({"params": params}, x)

  arguments = (_shared_params(gate), _normal(0, 7, 6))
  _assert_close(
    _outputs_and_gradients(fast, *arguments),
    _outputs_and_gradients(_token_by_token, *arguments),
  )


def _layer_params(gate: bool) -> dict[str, Any]:
  return {
    "router": {"kernel": _normal(5, 6, 3)},
    "gate_kernel": _normal(6, 3, 6, 5),
    "up_kernel": _normal(7, 3, 6, 5),
    "down_kernel": _normal(8, 3, 5, 6),
    "shared": _shared_params(gate),
  }


def _apply(config: ModelConfig, params, x) -> Any:
  return MoeFeedForward(config).apply(
    {"params": params}, x, segments=jnp.asarray(SEGMENTS)
  )


def _compiled(config: ModelConfig) -> Any:
  return jax.jit(functools.partial(_apply, config))


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_it_is_added_to_the_chosen_experts_sum(gate, capacity_factor):
  config = _config(
    shared_expert_dim=4,
    shared_expert_gate=gate,
    capacity_factor=capacity_factor,
  )
  routed = _config(capacity_factor=capacity_factor)
  params, x = _layer_params(gate), _normal(0, 1, 7, 6)
  valid = jnp.asarray(SEGMENTS[0] > 0, jnp.float32)[:, None]

  def fast(params, x):
    return _apply(config, params, x)[0]

  def slow(params, x):
    experts = {k: v for k, v in params.items() if k != "shared"}
    shared = _token_by_token(params["shared"], x[0]) * valid
    return _apply(routed, experts, x)[0] + shared[None]

  _assert_close(
    _outputs_and_gradients(fast, params, x),
    _outputs_and_gradients(slow, params, x),
  )
  # It is nobody's choice: the routing is the same.
  experts = {k: v for k, v in params.items() if k != "shared"}
  jax.tree.map(
    np.testing.assert_array_equal,
    _compiled(config)(params, x)[1],
    _compiled(routed)(experts, x)[1],
  )


def test_padding_gives_zeros():
  config = _config(shared_expert_dim=4)
  params, x = _layer_params(True), _normal(0, 1, 7, 6)
  apply = _compiled(config)
  out = apply(params, x)[0]
  np.testing.assert_array_equal(out[:, 5:], 0)
  assert np.all(np.abs(out[:, :5]).max(axis=-1) > 1e-3)
  other = apply(params, x.at[:, 5:].set(7.0))[0]
  np.testing.assert_array_equal(other, out)


@pytest.mark.parametrize("gate", [True, False])
def test_axes_and_sizes_are_its_own(gate):
  config = _config(shared_expert_dim=4, shared_expert_gate=gate)
  shapes, declared = axes.split_declared(
    jax.eval_shape(
      SharedExpert(config).init, jax.random.key(0), jnp.ones((7, 6))
    )
  )
  expected = {
    "gate_kernel": ((6, 4), "reads embed, writes shared_mlp"),
    "up_kernel": ((6, 4), "reads embed, writes shared_mlp"),
    "down_kernel": ((4, 6), "reads shared_mlp, writes embed"),
    "token_gate_kernel": ((6, 1), "reads embed, writes shared_expert"),
  }
  if not gate:
    del expected["token_gate_kernel"]
  found = {
    name: (shapes["params"][name].shape, str(leaf))
    for name, leaf in declared["params"].items()
  }
  assert found == expected


def test_half_precision_stays_half():
  config = _config(shared_expert_dim=4)
  params = _layer_params(True)
  x = _normal(0, 1, 7, 6).astype(jnp.bfloat16)
  out, _ = _compiled(config)(params, x)
  assert out.dtype == jnp.bfloat16
