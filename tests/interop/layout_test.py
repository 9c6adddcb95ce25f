"""How leaves lie in tensors: by hand, and one the inverse of the other."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax.core.axes import path_name
from aquila_jax.interop import families, layout, names
from aquila_jax.models import decoder_lm
from tests.interop import tiny

CONFIGS = {name: config for name, (config, _) in tiny.KINDS.items()}


def _leaves(config) -> dict[str, np.ndarray]:
  """A different number in every element, by the leaf's keys."""
  flat = jax.tree.leaves_with_path(decoder_lm.abstract_params(config))
  first, found = 0, {}
  for path, leaf in flat:
    key = path_name(path).replace("/", ".")
    numbers = np.arange(first, first + leaf.size, dtype=np.float32)
    found[key], first = numbers.reshape(leaf.shape), first + leaf.size
  return found


@pytest.mark.parametrize(
  ("table", "name"),
  [
    *(("hf", name) for name in CONFIGS),
    # GGUF's mixtures here have experts in all layers.
    *(("gguf", n) for n, config in CONFIGS.items() if not config.is_mixed),
  ],
)
def test_slots_fill_every_element_once_and_come_back(name, table):
  config = CONFIGS[name]
  if table == "hf":
    family, _ = families.write_config(config)
    slots = layout.slots(config, family.tensors)
  else:
    moe = config.moe is not None
    slots = layout.slots(config, names.GGUF_MOE if moe else names.GGUF_DENSE)
  assert len({slot.tensor for slot in slots}) == len(slots)
  leaves = _leaves(config)
  refilled = {key: np.full_like(leaf, -1) for key, leaf in leaves.items()}
  for slot in slots:
    tensor = slot.to_tensor(leaves[slot.leaf][slot.index])
    assert tensor.shape == slot.shape
    back = refilled[slot.leaf][slot.index]
    assert np.all(back == -1)
    back[...] = slot.to_part(tensor)
  for key, leaf in leaves.items():
    np.testing.assert_array_equal(refilled[key], leaf)


def _tensors(config, table) -> dict[str, np.ndarray]:
  leaves = _leaves(config)
  return {
    slot.tensor: slot.to_tensor(leaves[slot.leaf][slot.index])
    for slot in layout.slots(config, table)
  }


# D=8, N=4 heads in K=2 groups of G=2, H=4, F=6, V=11, E=3 experts.
def test_attention_lies_as_transformers_has_it():
  config = dataclasses.replace(CONFIGS["all biases"], qk_norm=True)
  leaves = _leaves(config)
  tensors = _tensors(config, names.HF_DENSE)
  prefix, own = "model.layers.1.self_attn.", "layers.attention."
  query = leaves[own + "query_kernel"][1]  # [D, K, G, H]
  found = tensors[prefix + "q_proj.weight"]
  assert found.shape == (16, 8)
  for d, k, g, h in np.ndindex(8, 2, 2, 4):
    # Head n = k * G + g holds rows n * H to (n + 1) * H.
    assert found[(2 * k + g) * 4 + h, d] == query[d, k, g, h]
  key = leaves[own + "key_kernel"][1]  # [D, K, H]
  found = tensors[prefix + "k_proj.weight"]
  assert found.shape == (8, 8)
  for d, k, h in np.ndindex(8, 2, 4):
    assert found[4 * k + h, d] == key[d, k, h]
  out = leaves[own + "out_kernel"][1]  # [K, G, H, D]
  found = tensors[prefix + "o_proj.weight"]
  assert found.shape == (8, 16)
  for k, g, h, d in np.ndindex(2, 2, 4, 8):
    assert found[d, (2 * k + g) * 4 + h] == out[k, g, h, d]
  for ours, theirs in (
    ("query_bias", "q_proj.bias"),
    ("value_bias", "v_proj.bias"),
    ("out_bias", "o_proj.bias"),
    ("query_norm.scale", "q_norm.weight"),
    ("key_norm.scale", "k_norm.weight"),
  ):
    np.testing.assert_array_equal(
      tensors[prefix + theirs], leaves[own + ours][1].reshape(-1)
    )


def test_tables_and_ffn_lie_as_transformers_has_them():
  leaves, tensors = _leaves(tiny.DENSE), _tensors(tiny.DENSE, names.HF_DENSE)
  # The embedding is [V, D] in both; the head is [V, D], of our [D, V].
  for ours, theirs, transposed in (
    ("embedding.table", "model.embed_tokens.weight", False),
    ("lm_head.kernel", "lm_head.weight", True),
  ):
    expected = leaves[ours].T if transposed else leaves[ours]
    np.testing.assert_array_equal(tensors[theirs], expected)
    assert tensors[theirs].shape == (11, 8)
  for ours, theirs in (
    ("gate_kernel", "gate_proj"),
    ("up_kernel", "up_proj"),
    ("down_kernel", "down_proj"),
  ):
    np.testing.assert_array_equal(
      tensors[f"model.layers.0.mlp.{theirs}.weight"],
      leaves[f"layers.mlp.{ours}"][0].T,
    )
  np.testing.assert_array_equal(
    tensors["model.norm.weight"], leaves["final_norm.scale"]
  )
  for ours, theirs in (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
  ):
    np.testing.assert_array_equal(
      tensors[f"model.layers.1.{theirs}.weight"],
      leaves[f"layers.{ours}.scale"][1],
    )


def test_experts_lie_apart_in_transformers_and_stacked_in_gguf():
  config = CONFIGS["shared expert"]
  leaves = _leaves(config)
  mixtral = _tensors(CONFIGS["experts"], names.HF_MIXTRAL)
  qwen = _tensors(config, names.HF_QWEN_MOE)
  gguf = _tensors(config, names.GGUF_MOE)
  router = leaves["layers.mlp.router.kernel"][1].T  # [E, D]
  np.testing.assert_array_equal(qwen["model.layers.1.mlp.gate.weight"], router)
  np.testing.assert_array_equal(gguf["blk.1.ffn_gate_inp.weight"], router)
  up = leaves["layers.mlp.up_kernel"][1]  # [E, D, F]
  for e in range(3):
    np.testing.assert_array_equal(
      qwen[f"model.layers.1.mlp.experts.{e}.up_proj.weight"], up[e].T
    )
    np.testing.assert_array_equal(gguf["blk.1.ffn_up_exps.weight"][e], up[e].T)
  own = _leaves(CONFIGS["experts"])
  prefix = "model.layers.0.block_sparse_moe.experts.2."
  for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
    np.testing.assert_array_equal(
      mixtral[f"{prefix}{theirs}.weight"],
      own[f"layers.mlp.{ours}_kernel"][0, 2].T,
    )
  # How much of the shared expert a token takes: [1, D].
  shared = "layers.mlp.shared."
  np.testing.assert_array_equal(
    qwen["model.layers.1.mlp.shared_expert_gate.weight"],
    leaves[shared + "token_gate_kernel"][1].T,
  )
  np.testing.assert_array_equal(
    qwen["model.layers.1.mlp.shared_expert.down_proj.weight"],
    leaves[shared + "down_kernel"][1].T,
  )


def test_a_part_of_another_shape_is_our_fault():
  slot = layout.slots(tiny.DENSE, names.HF_DENSE)[0]
  assert slot.leaf == "embedding.table"
  with pytest.raises(AssertionError, match=r"embedding.table.*\(8, 11\)"):
    slot.to_tensor(np.zeros((8, 11)))
  with pytest.raises(AssertionError, match=r"embed_tokens.*\(8, 11\)"):
    slot.to_part(np.zeros((8, 11)))


def test_a_leaf_without_a_name_is_an_error():
  with pytest.raises(KeyError):
    layout.slots(CONFIGS["shared expert"], names.HF_MIXTRAL)
