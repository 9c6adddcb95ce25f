"""Every family and option: imported, compared, exported, imported again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aquila_jax.interop import families
from aquila_jax.interop.stock_model import StockModel
from tests.parity import checking, tiny_models

_LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=5e5,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
_LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
_TIED = dict(tie_word_embeddings=True)


def _windowed(size: int) -> dict[str, Any]:
  return dict(use_sliding_window=True, sliding_window=size, max_window_layers=0)


def _heads(kv: int) -> dict[str, Any]:
  return dict(num_key_value_heads=kv)


# 6 query heads on 6, 2 and 1 key/value heads: MHA, GQA and MQA. Tied where the
# family's neighbour is not.
_DENSE = [
  (name, _heads(kv) | (_TIED if (row + column) % 2 else {}))
  for row, name in enumerate(("Llama", "Mistral", "Qwen2", "Qwen3"))
  for column, kv in enumerate((6, 2, 1))
]
_OPTIONS = [
  ("Llama", dict(attention_bias=True)),
  ("Llama", dict(attention_bias=True, head_dim=12) | _TIED),
  ("Llama", dict(rope_parameters=_LLAMA3)),
  ("Llama", dict(rope_parameters=_LLAMA3, attention_bias=True) | _heads(1)),
  ("Llama", dict(rope_parameters=_LINEAR)),
  ("Mistral", dict(sliding_window=7, head_dim=16)),
  ("Mistral", dict(sliding_window=None, rope_parameters=_LINEAR)),
  ("Qwen2", _windowed(9) | _TIED),
  ("Qwen2", dict(rope_parameters=_LLAMA3)),
  ("Qwen3", dict(head_dim=16)),
  ("Qwen3", dict(head_dim=10, attention_bias=True) | _windowed(9)),
]
_MIXTRAL = [
  ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=k))
  for k in (1, 2, 5)
]
_QWEN_MOE = [
  (name, dict(num_experts_per_tok=k, norm_topk_prob=norm))
  for name in ("Qwen2Moe", "Qwen3Moe")
  for k in (1, 2, 6)
  for norm in (False, True)
]
_MOE_OPTIONS = [
  ("Mixtral", dict(sliding_window=11, head_dim=20) | _heads(1) | _TIED),
  ("Mixtral", dict(rope_parameters=_LLAMA3) | _heads(6)),
  ("Qwen2Moe", dict(qkv_bias=False, norm_topk_prob=True) | _TIED),
  ("Qwen2Moe", _windowed(9) | _heads(6)),
  ("Qwen2Moe", dict(decoder_sparse_step=2, intermediate_size=24)),
  ("Qwen3Moe", dict(mlp_only_layers=[0], intermediate_size=24)),
  ("Qwen3Moe", dict(head_dim=16, attention_bias=True) | _windowed(9)),
  ("Qwen3Moe", dict(rope_parameters=_LLAMA3, norm_topk_prob=True) | _TIED),
]
_CASES = _DENSE + _OPTIONS + _MIXTRAL + _QWEN_MOE + _MOE_OPTIONS


def _named(options: dict[str, Any]) -> str:
  """As a person would say them."""
  short = options.copy()
  rope = short.pop("rope_parameters", None)
  words = [f"{key}={value}" for key, value in short.items()]
  return ", ".join(words + ([f"rope {rope['rope_type']}"] if rope else []))


@pytest.mark.parametrize(
  ("name", "options"), _CASES, ids=[f"{n}-{_named(o)}" for n, o in _CASES]
)
def test_a_stock_model_imports_and_exports_as_itself(
  name, options, tmp_path, records
):
  source = tmp_path / "source"
  tiny_models.build(name, options, source)
  reference = StockModel(str(source))
  ours = checking.imported(source, tmp_path / "model")
  found = checking.compare(ours, reference)
  checking.record(
    records,
    found,
    section="imported",
    options=_named(options),
    reference=reference,
  )
  assert found.failures == []
  export = tmp_path / "export"
  shards = checking.exported(
    tmp_path / "model", export, max_shard_bytes=100_000
  )
  assert shards.num_shards > 1
  again = StockModel(str(export))
  assert checking.compare(ours, again, continue_tokens=0).failures == []
  if shards.architecture == reference.architecture:
    expected = reference.model.state_dict()
    exported = again.model.state_dict()
    # Biases of zeros, which vLLM wants where Qwen2-MoE has none.
    family, _ = families.write_config(ours.config)
    idle = families.idle_tensors(family, ours.config)
    assert set(exported) == set(expected) | set(idle)
    for key, tensor in expected.items():
      np.testing.assert_array_equal(exported[key], tensor, err_msg=key)
    for key, tensor in idle.items():
      assert (np.asarray(exported[key]) == tensor.value).all(), key
  checking.assert_same_model(
    checking.imported(export, tmp_path / "again"), ours
  )
