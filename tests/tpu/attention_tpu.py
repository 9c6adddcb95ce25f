"""A layer's attention by the TPU's compiler: what it makes of lanes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.layers import rotary
from aquila_jax.layers.attention import Attention
from aquila_jax.planning.tpu_schedule import Clock

_LENGTH, _HEAD_DIM = 1024, 128


def _compiled(topology: str) -> jax.stages.Compiled:
  """Two layers and their gradient, each computed again as under remat."""
  clock = Clock(topology)
  config = ModelConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=512,
    mlp_dim=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=_HEAD_DIM,
    context_length=_LENGTH,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
  )
  layer = Attention(config)
  placed = SingleDeviceSharding(clock.device)

  def like(tree):
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), tree
    )

  x = jax.ShapeDtypeStruct((2, _LENGTH, config.embed_dim), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((2, _LENGTH), jnp.int32)

  def call(params, x, segments):
    tables = rotary.tables_of(config, jnp.cumsum(segments, axis=1))
    return x + layer.apply(params, x, tables=tables, segments=segments)[0]

  def initial(x, segments):
    tables = rotary.tables_of(config, segments)
    return layer.init(jax.random.key(0), x, tables=tables, segments=segments)

  def loss(params, x, segments):
    def one(x, _):
      return jax.checkpoint(call, prevent_cse=False)(params, x, segments), None

    x, _ = jax.lax.scan(one, x, None, length=2)
    return jnp.sum(x.astype(jnp.float32))

  kind = clock.device.device_kind
  with compiling_for(Target(platform="tpu", device_kind=kind)):
    params = like(jax.eval_shape(initial, x, segments))
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    lowered = gradient.lower(params, like(x), like(segments))
    return lowered.compile()


@pytest.mark.parametrize("topology", ["v6e:2x2", "v5p:2x2x1"])
def test_rotated_heads_are_in_no_halves(topology, monkeypatch):
  """What is computed in registers is in no array of its own."""

  def halves() -> list[str]:
    text = _compiled(topology).as_text() or ""
    assert "splash_mqa_fwd" in text
    text = re.sub(r"%fused_comp\S* \(.*?\n}", "", text, flags=re.DOTALL)
    return re.findall(rf"bf16\[2,{_LENGTH},2,2,{_HEAD_DIM // 2}\]", text)

  assert not halves()
  # As for other devices.
  elsewhere = Target(platform="cpu", device_kind="cpu")
  monkeypatch.setattr(rotary, "target", lambda: elsewhere)
  assert halves()
