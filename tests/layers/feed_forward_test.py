"""SwiGLU against its formula, neuron by neuron."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.core import axes
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.layers.feed_forward import FeedForward
from aquila_jax.sharding.mesh import abstract_mesh

CONFIG = ModelConfig(
  vocab_size=8,
  num_layers=1,
  embed_dim=4,
  mlp_dim=5,
  num_heads=1,
  num_kv_heads=1,
  head_dim=2,
)


def _inputs():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4)).astype(np.float32)
  params = {
    "gate_kernel": rng.normal(size=(4, 5)).astype(np.float32),
    "up_kernel": rng.normal(size=(4, 5)).astype(np.float32),
    "down_kernel": rng.normal(size=(5, 4)).astype(np.float32),
  }
  return jax.tree.map(jnp.asarray, (x, params))


def _neuron_by_neuron(x, params):
  out = jnp.zeros_like(x)
  for f in range(5):
    gate = x @ params["gate_kernel"][:, f]
    up = x @ params["up_kernel"][:, f]
    hidden = gate / (1 + jnp.exp(-gate)) * up
    out += hidden[..., None] * params["down_kernel"][f][None, None]
  return out


def test_output_and_gradients_equal_the_formula():
  x, params = _inputs()
  weights = jnp.asarray(
    np.random.default_rng(1).normal(size=x.shape), jnp.float32
  )

  def fast(x, params) -> Any:
    return FeedForward(CONFIG).apply({"params": params}, x)

  np.testing.assert_allclose(
    jax.jit(fast)(x, params),
    jax.jit(_neuron_by_neuron)(x, params),
    atol=1e-5,
  )
  found, expected = (
    jax.jit(jax.grad(lambda *a, f=f: jnp.sum(weights * f(*a)), argnums=(0, 1)))(
      x, params
    )
    for f in (fast, _neuron_by_neuron)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected
  )


def test_axes_are_declared_with_their_direction():
  x, _ = _inputs()
  _, declared = axes.split_declared(
    jax.eval_shape(FeedForward(CONFIG).init, jax.random.key(0), x)
  )
  assert {k: str(leaf) for k, leaf in declared["params"].items()} == {
    "gate_kernel": "reads embed, writes mlp",
    "up_kernel": "reads embed, writes mlp",
    "down_kernel": "reads mlp, writes embed",
  }


def test_kernels_are_gathered_where_tokens_are_divided():
  """Else the TPU compiler gathers the tokens of all devices."""
  config = dataclasses.replace(CONFIG, mlp_dim=6)
  x, across, down = jnp.ones((2, 3, 4)), jnp.ones((4, 6)), jnp.ones((6, 4))
  params = dict(gate_kernel=across, up_kernel=across, down_kernel=down)
  mesh = abstract_mesh(MeshConfig(data=1, fsdp=2, tensor=2), num_devices=4)

  def run(params) -> Any:
    return FeedForward(config).apply({"params": params}, x)

  # On one device there is nothing to gather.
  assert "sharding_constraint" not in str(jax.make_jaxpr(run)(params))
  with jax.sharding.use_abstract_mesh(mesh):
    text = str(jax.make_jaxpr(run)(params))
  found = re.findall(r"spec=P\w*\((.*)\)\)", text)
  # Between them the hidden units stay where they are computed.
  assert sorted(found) == [
    "'tensor', None",
    "('data', 'fsdp', 'expert'), 'sequence', 'tensor'",
    "None, 'tensor'",
    "None, 'tensor'",
  ]
