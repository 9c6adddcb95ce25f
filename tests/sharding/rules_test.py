"""Parameters lie where the table says, and sharding changes no result."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from aquila_jax.core.axes import AXIS_NAMES
from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import batch_sharding, make_mesh
from aquila_jax.sharding.rules import STORAGE, param_shardings, without


def _config(*, moe: MoeConfig | None = None, **sizes) -> ModelConfig:
  defaults: dict[str, Any] = dict(
    vocab_size=48,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    context_length=16,
    compute_dtype="float32",
    moe=moe,
  )
  return ModelConfig(**(defaults | sizes))


DENSE = _config()
DROPLESS = _config(moe=MoeConfig(num_experts=4, top_k=2, block_size=8))
SHARED = _config(
  moe=MoeConfig(num_experts=4, top_k=2, block_size=8, shared_expert_dim=12),
  qk_norm=True,
  out_bias=True,
  sliding_window=5,
)
MIXED = _config(
  num_layers=3,
  moe=MoeConfig(num_experts=4, top_k=2, block_size=8, layers=(0, 2)),
  remat="full",
  head_chunks=4,
)
CAPACITY = _config(moe=MoeConfig(num_experts=4, top_k=2, capacity_factor=0.75))


def _shardings(config: ModelConfig, mesh):
  return param_shardings(
    decoder_lm.parameter_axes(config), decoder_lm.abstract_params(config), mesh
  )


def test_every_axis_has_a_rule():
  assert sorted(STORAGE) == sorted(AXIS_NAMES)


def test_leaves_lie_where_the_table_says():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  specs = jax.tree.map(lambda s: s.spec, _shardings(DROPLESS, mesh))
  attention, mlp = specs["layers"]["attention"], specs["layers"]["mlp"]
  assert attention["query_kernel"] == P(None, "fsdp", "tensor", None, None)
  assert attention["key_bias"] == P(None, "tensor", None)
  assert attention["out_kernel"] == P(None, "tensor", None, None, "fsdp")
  assert mlp["gate_kernel"] == P(None, "expert", "fsdp", "tensor")
  assert mlp["down_kernel"] == P(None, "expert", ("tensor", "fsdp"), None)
  assert mlp["router"]["kernel"] == P(None, "fsdp", "expert")
  assert specs["embedding"]["table"] == P("tensor", "fsdp")
  assert specs["lm_head"]["kernel"] == P("fsdp", "tensor")
  assert specs["final_norm"]["scale"] == P("fsdp")


def test_devices_that_share_rows_hold_a_part_each():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
  specs = jax.tree.map(lambda s: s.spec, _shardings(DROPLESS, mesh))
  mlp = specs["layers"]["mlp"]
  assert mlp["gate_kernel"] == P(None, "expert", ("fsdp", "sequence"), "tensor")
  assert mlp["down_kernel"] == P(
    None, "expert", ("tensor", "fsdp", "sequence"), None
  )
  assert specs["embedding"]["table"] == P("tensor", ("fsdp", "sequence"))
  # Of what fsdp divides and sequence does not, devices have the same.
  specs = jax.tree.map(
    lambda s: s.spec, _shardings(_config(embed_dim=18), mesh)
  )
  assert specs["final_norm"]["scale"] == P("fsdp")


def test_rows_are_cut_where_they_divide_and_else_columns():
  mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  specs = jax.tree.map(lambda s: s.spec, _shardings(_config(mlp_dim=24), mesh))
  assert specs["layers"]["mlp"]["down_kernel"] == P(
    None, ("tensor", "fsdp"), None
  )
  specs = jax.tree.map(lambda s: s.spec, _shardings(_config(mlp_dim=20), mesh))
  assert specs["layers"]["mlp"]["down_kernel"] == P(None, "tensor", "fsdp")


def test_leaves_that_some_layers_have_lie_as_those_of_all():
  moe = MoeConfig(num_experts=4, top_k=2, block_size=8, layers=(1,))
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  specs = jax.tree.map(lambda s: s.spec, _shardings(_config(moe=moe), mesh))
  layers = specs["layers"]
  assert layers["mlp"]["down_kernel"] == P(
    None, "expert", ("tensor", "fsdp"), None
  )
  assert layers["dense_mlp"]["down_kernel"] == P(None, ("tensor", "fsdp"), None)
  assert layers["dense_mlp"]["up_kernel"] == P(None, "fsdp", "tensor")
  moe = dataclasses.replace(moe, dense_mlp_dim=25)
  with pytest.raises(UserError) as caught:
    _shardings(_config(moe=moe), mesh)
  assert str(caught.value) == (
    "config.mesh.tensor=2 does not divide model.moe.dense_mlp_dim (by default"
    " model.mlp_dim)=25; nearest sizes that do: 1 or 5"
  )


def test_leaves_of_options_lie_where_the_table_says():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  specs = jax.tree.map(lambda s: s.spec, _shardings(SHARED, mesh))
  attention = specs["layers"]["attention"]
  assert attention["out_bias"] == P(None, "fsdp")
  assert attention["query_norm"]["scale"] == P(None, None)
  shared = specs["layers"]["mlp"]["shared"]
  assert shared["gate_kernel"] == P(None, "fsdp", "tensor")
  assert shared["down_kernel"] == P(None, ("tensor", "fsdp"), None)
  assert shared["token_gate_kernel"] == P(None, "fsdp", None)


def test_a_spec_without_an_axis():
  spec = P(("tensor", "fsdp"), "fsdp", None, "expert")
  assert without(spec, ("fsdp",)) == P("tensor", None, None, "expert")


def test_vocabulary_that_does_not_divide_stays_whole():
  mesh = make_mesh(MeshConfig(data=4, tensor=2))
  specs = jax.tree.map(
    lambda s: s.spec, _shardings(_config(vocab_size=49), mesh)
  )
  assert specs["embedding"]["table"] == P(None, "fsdp")
  assert specs["lm_head"]["kernel"] == P("fsdp", None)


@pytest.mark.parametrize(
  ("config", "mesh_config", "message"),
  [
    (
      _config(num_heads=6, num_kv_heads=6),
      MeshConfig(data=2, tensor=4),
      "config.mesh.tensor=4 does not divide model.num_kv_heads=6; nearest"
      " sizes that do: 3 or 6",
    ),
    (
      _config(moe=MoeConfig(num_experts=6)),
      MeshConfig(data=2, expert=4),
      "config.mesh.expert=4 does not divide model.moe.num_experts=6; nearest"
      " sizes that do: 3 or 6",
    ),
    (
      _config(mlp_dim=30),
      MeshConfig(data=2, tensor=4),
      "config.mesh.tensor=4 does not divide model.mlp_dim=30; nearest sizes"
      " that do: 3 or 5",
    ),
    (
      _config(moe=MoeConfig(shared_expert_dim=30)),
      MeshConfig(data=2, tensor=4),
      "config.mesh.tensor=4 does not divide model.moe.shared_expert_dim=30;"
      " nearest sizes that do: 3 or 5",
    ),
    (
      _config(embed_dim=18),
      MeshConfig(data=2, fsdp=4),
      "config.mesh.fsdp=4 does not divide model.embed_dim=18; nearest sizes"
      " that do: 3 or 6",
    ),
  ],
)
def test_size_that_does_not_divide_is_refused(config, mesh_config, message):
  with pytest.raises(UserError) as error:
    _shardings(config, make_mesh(mesh_config))
  assert str(error.value) == message


def _batch(rows: int = 8, length: int = 16):
  """Two documents a row, and padding at the end of some."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 48, (rows, length), np.int32)
  segments = np.ones((rows, length), np.int32)
  segments[:, 7:] = 2
  segments[::3, 13:] = 0
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  positions = np.where(segments == 2, positions - 7, positions)
  return tokens, positions, segments


def _loss(config: ModelConfig, params, tokens, positions, segments):
  out: Any = decoder_lm.DecoderLM(config).apply(
    {"params": params}, tokens, positions=positions, segments=segments
  )
  log_probability = jax.nn.log_softmax(out.logits, axis=-1)
  targets = jnp.roll(tokens, -1, axis=1)
  chosen = jnp.take_along_axis(log_probability, targets[..., None], axis=-1)
  loss = -jnp.mean(chosen[..., 0] * (segments > 0).astype(jnp.float32))
  if out.routing is not None:
    loss += 0.1 * jnp.mean(out.routing.balance_loss)
    loss += 0.1 * jnp.mean(out.routing.z_loss)
  return loss


@functools.cache
def _unsharded(config: ModelConfig):
  # A larger deviation than at the start of training, so that no gradient is
  # lost in rounding and no two router logits are nearly equal.
  params = jax.tree.map(
    lambda leaf: 8 * leaf if leaf.ndim > 2 else leaf,
    jax.jit(functools.partial(decoder_lm.init_params, config))(
      key=jax.random.key(1)
    ),
  )
  value_and_grad = jax.jit(jax.value_and_grad(functools.partial(_loss, config)))
  return params, value_and_grad(params, *_batch())


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize(
  ("config", "mesh_config"),
  [
    (DENSE, MeshConfig(data=1, fsdp=8)),
    (DENSE, MeshConfig(data=2, expert=1, tensor=4)),
    (DENSE, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    (DENSE, MeshConfig(data=1, sequence=8)),
    (DENSE, MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)),
    (DROPLESS, MeshConfig(data=8)),
    (DROPLESS, MeshConfig(data=2, expert=4)),
    (DROPLESS, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    (DROPLESS, MeshConfig(data=1, expert=2, sequence=4)),
    (CAPACITY, MeshConfig(data=1, fsdp=2, expert=4)),
    (CAPACITY, MeshConfig(data=2, sequence=4)),
    (CAPACITY, MeshConfig(data=1, fsdp=2, expert=2, sequence=2)),
    (SHARED, MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    (SHARED, MeshConfig(data=1, expert=2, sequence=2, tensor=2)),
    (MIXED, MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)),
  ],
)
def test_sharded_loss_and_gradients_equal_unsharded_ones(config, mesh_config):
  params, (loss, grads) = _unsharded(config)
  mesh = make_mesh(mesh_config)
  shardings = _shardings(config, mesh)
  rows = batch_sharding(mesh)

  def loss_on_mesh(*arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return _loss(config, *arguments)

  value_and_grad = jax.jit(
    jax.value_and_grad(loss_on_mesh),
    in_shardings=(shardings, rows, rows, rows),
    out_shardings=(None, shardings),
  )
  sharded_loss, sharded_grads = value_and_grad(
    jax.device_put(params, shardings), *jax.device_put(_batch(), rows)
  )
  # The same sums in another order. The longest is over 128 tokens after some
  # 10 products in a row of length <= 48: a relative error of about
  # sqrt(128) + 10 sqrt(48) = 81 roundings of 2^-24, relative to the largest
  # entry of a leaf, of which small entries are differences.
  tolerance = 81 * 2.0**-24
  np.testing.assert_allclose(sharded_loss, loss, rtol=tolerance)

  def check(sharded, expected):
    scale = np.max(np.abs(expected))
    assert scale > 1e-6
    np.testing.assert_allclose(
      sharded, expected, rtol=0, atol=tolerance * scale
    )

  jax.tree.map(check, sharded_grads, grads)
