"""The table has every leaf, and the bytes that are really there."""

from __future__ import annotations

import jax

from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.explain import explain
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings

CONFIG = ModelConfig(
  vocab_size=48,
  num_layers=2,
  embed_dim=16,
  mlp_dim=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  context_length=16,
  moe=MoeConfig(num_experts=4, top_k=2),
)


def test_every_leaf_has_a_line_and_its_bytes():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  axes = decoder_lm.parameter_axes(CONFIG)
  shapes = decoder_lm.abstract_params(CONFIG)
  text = explain(axes, shapes, mesh=mesh)
  assert text.startswith(
    "mesh: data 1, fsdp 2, expert 2, sequence 1, tensor 2\n"
  )
  squeezed = [" ".join(line.split()) for line in text.splitlines()]
  assert (
    "layers/mlp/down_kernel 2 x 4 x 24 x 16 layer, expert, mlp, embed expert:"
    " expert, mlp: tensor and fsdp 2 x 2 x 6 x 16 1,536" in squeezed
  )
  assert (
    "layers/attention/query_norm" not in text
    and "layers/mlp_norm/scale 2 x 16 layer, embed embed: fsdp 2 x 8 64"
    in squeezed
  )
  assert len(squeezed) == 4 + len(jax.tree.leaves(shapes))
  params = jax.device_put(
    decoder_lm.init_params(CONFIG, key=jax.random.key(0)),
    param_shardings(axes, shapes, mesh),
  )
  held = sum(
    leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)
  )
  whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert squeezed[-2].startswith(
    f"{held:,} bytes of parameters a device, of {whole:,};"
  )
  assert squeezed[-1] == (
    "in a step: row: fsdp and expert, vocab: tensor, kv_head: tensor, mlp:"
    " tensor, dense_mlp: tensor, shared_mlp: tensor"
  )


def test_axes_of_one_device_are_not_named():
  mesh = make_mesh(MeshConfig())
  axes = decoder_lm.parameter_axes(CONFIG)
  text = explain(axes, decoder_lm.abstract_params(CONFIG), mesh=mesh)
  assert "fsdp:" not in text
  assert "layers/mlp/down_kernel" in text
  assert "whole everywhere" in text
