"""Models of our own as stock classes: dense, mixtures, and half precision."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel, save_model
from aquila_jax.interop.stock_model import StockModel
from aquila_jax.models import decoder_lm
from tests.parity import checking

DENSE = ModelConfig(
  vocab_size=256,
  num_layers=3,
  embed_dim=48,
  mlp_dim=40,
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  context_length=256,
  rope_theta=1e4,
  init_std=0.2,
  compute_dtype="float32",
)
MOE = MoeConfig(num_experts=6, top_k=2, router_init_std=0.2)


def with_moe(config: ModelConfig = DENSE, **options) -> ModelConfig:
  return dataclasses.replace(config, moe=dataclasses.replace(MOE, **options))


def random_model(config: ModelConfig) -> StoredModel:
  """Of which norms are not ones and biases not zeros."""
  params = jax.jit(functools.partial(decoder_lm.init_params, config))(
    key=jax.random.key(0)
  )
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = structure.unflatten(
    [
      leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
  )
  return StoredModel(
    config=config, lineage=Lineage(), params=params, tokenizer=None
  )


def saved(model: StoredModel, path: pathlib.Path) -> StoredModel:
  save_model(path, model, axes=decoder_lm.parameter_axes(model.config))
  return model


_NO_BIAS = dataclasses.replace(DENSE, qkv_bias=False)
_QK_NORM = dataclasses.replace(_NO_BIAS, qk_norm=True)
_LATE: dict[str, Any] = dict(router_order="softmax_then_topk")
_CASES = [
  ("Qwen2ForCausalLM", "QKV bias", DENSE),
  ("LlamaForCausalLM", "no bias", _NO_BIAS),
  (
    "LlamaForCausalLM",
    "QKV and output bias",
    dataclasses.replace(DENSE, out_bias=True),
  ),
  (
    "LlamaForCausalLM",
    "output bias only",
    dataclasses.replace(_NO_BIAS, out_bias=True),
  ),
  (
    "MistralForCausalLM",
    "no bias, window",
    dataclasses.replace(_NO_BIAS, sliding_window=9),
  ),
  ("Qwen3ForCausalLM", "qk_norm", _QK_NORM),
  (
    "Qwen3ForCausalLM",
    "qk_norm, QKV bias",
    dataclasses.replace(_QK_NORM, qkv_bias=True),
  ),
  ("Qwen2MoeForCausalLM", "QKV bias, top-k then softmax", with_moe()),
  (
    "Qwen2MoeForCausalLM",
    "QKV bias, top-k then softmax, top 1",
    with_moe(top_k=1),
  ),
  (
    "Qwen2MoeForCausalLM",
    "QKV bias, softmax then top-k, renormalised",
    with_moe(**_LATE),
  ),
  (
    "Qwen2MoeForCausalLM",
    "QKV bias, softmax then top-k",
    with_moe(**_LATE, renormalise=False),
  ),
  (
    "Qwen2MoeForCausalLM",
    "QKV bias, top-k then softmax, shared expert, tied, window",
    with_moe(
      dataclasses.replace(DENSE, tied_embeddings=True, sliding_window=9),
      shared_expert_dim=20,
    ),
  ),
  (
    "Qwen2MoeForCausalLM",
    "no bias, softmax then top-k",
    with_moe(_NO_BIAS, **_LATE, renormalise=False),
  ),
  ("MixtralForCausalLM", "no bias, top-k then softmax", with_moe(_NO_BIAS)),
  (
    "MixtralForCausalLM",
    "no bias, softmax then top-k, renormalised",
    with_moe(_NO_BIAS, **_LATE),
  ),
  (
    "Qwen2MoeForCausalLM",
    "no bias, top-k then softmax, experts in every second layer",
    with_moe(_NO_BIAS, layers="every_second"),
  ),
  (
    "Qwen2MoeForCausalLM",
    "QKV bias, shared expert, experts in layers 0 and 2",
    with_moe(shared_expert_dim=20, layers=(0, 2)),
  ),
  (
    "Qwen3MoeForCausalLM",
    "qk_norm, top-k then softmax, experts in the last half",
    with_moe(_QK_NORM, layers="last_half"),
  ),
  (
    "Qwen2MoeForCausalLM",
    "no bias, top-k then softmax, experts in every second layer, wider FFNs",
    with_moe(_NO_BIAS, layers="every_second", dense_mlp_dim=64),
  ),
  (
    "Qwen3MoeForCausalLM",
    "qk_norm, top-k then softmax, experts in layers 0 and 2, narrower FFNs",
    with_moe(_QK_NORM, layers=(0, 2), dense_mlp_dim=24),
  ),
  ("Qwen3MoeForCausalLM", "qk_norm, top-k then softmax", with_moe(_QK_NORM)),
  (
    "Qwen3MoeForCausalLM",
    "qk_norm, softmax then top-k",
    with_moe(_QK_NORM, **_LATE, renormalise=False),
  ),
]


@pytest.mark.parametrize(
  ("architecture", "options", "config"),
  _CASES,
  ids=[f"{name}-{options}" for name, options, _ in _CASES],
)
def test_our_model_is_the_same_in_transformers(
  architecture, options, config, tmp_path, records
):
  ours = saved(random_model(config), tmp_path / "model")
  export = checking.exported(tmp_path / "model", tmp_path / "export")
  assert export.architecture == architecture
  reference = StockModel(str(tmp_path / "export"))
  assert reference.architecture == architecture
  found = checking.compare(ours, reference)
  checking.record(
    records, found, section="exported", options=options, reference=reference
  )
  assert found.failures == []
  checking.assert_same_model(
    checking.imported(tmp_path / "export", tmp_path / "again"), ours
  )


@pytest.mark.parametrize(
  "config", [DENSE, with_moe(_NO_BIAS)], ids=["dense", "mixture"]
)
def test_an_export_in_half_precision_is_the_model_rounded_once(
  config, tmp_path, records
):
  saved(random_model(config), tmp_path / "model")
  checking.exported(tmp_path / "model", tmp_path / "export", dtype="bfloat16")
  again = checking.imported(tmp_path / "export", tmp_path / "again")
  model = checking.load(tmp_path / "model")
  jax.tree.map(
    lambda one, other: np.testing.assert_array_equal(
      one, other.astype(jnp.bfloat16)
    ),
    again.params,
    model.params,
  )
  reference = StockModel(str(tmp_path / "export"))
  found = checking.compare(again, reference)
  checking.record(
    records,
    found,
    section="exported",
    options="bfloat16 tensors",
    reference=reference,
  )
  assert found.failures == []
