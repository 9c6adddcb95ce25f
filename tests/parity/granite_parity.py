"""Which stock class takes a mixture with QKV bias: Qwen2-MoE, or Granite-MoE.

Both can compute it. The export takes Qwen2-MoE; docs/parity.md says why.
"""

from __future__ import annotations

import pathlib

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.interop.stock_model import StockModel
from tests.parity import checking
from tests.parity.exported_parity import random_model, saved, with_moe


def _as_granite(config: ModelConfig, stock: StockModel, path: pathlib.Path):
  """The tensors of our export to Qwen2-MoE, as Granite-MoE has them."""
  assert config.moe is not None
  granite = transformers.GraniteMoeForCausalLM(
    transformers.GraniteMoeConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.embed_dim,
      intermediate_size=config.mlp_dim,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      max_position_embeddings=config.context_length,
      rms_norm_eps=config.norm_epsilon,
      rope_theta=config.rope_theta,
      attention_bias=True,
      num_local_experts=config.moe.num_experts,
      num_experts_per_tok=config.moe.top_k,
      tie_word_embeddings=False,
      # All others are 1 by default.
      attention_multiplier=config.head_dim**-0.5,
    )
  )
  # In memory both keep gate and up in one tensor.
  found = {
    key.replace(".mlp.gate.", ".block_sparse_moe.router.").replace(
      ".mlp.experts.", ".block_sparse_moe.experts."
    ): value
    for key, value in stock.model.state_dict().items()
    if "shared_expert" not in key
  }
  for i in range(config.num_layers):
    name = f"model.layers.{i}.self_attn.o_proj.bias"
    found[name] = torch.zeros(config.embed_dim)
  granite.load_state_dict(found)  # strict
  granite.save_pretrained(path)


def test_granite_and_qwen2_moe_compute_the_same(tmp_path, records):
  config = with_moe()
  ours = saved(random_model(config), tmp_path / "model")
  checking.exported(tmp_path / "model", tmp_path / "qwen")
  qwen = StockModel(str(tmp_path / "qwen"))
  _as_granite(config, qwen, tmp_path / "granite")
  granite = StockModel(str(tmp_path / "granite"))
  for reference in (qwen, granite):
    found = checking.compare(ours, reference)
    checking.record(
      records,
      found,
      section="QKV bias and experts",
      options="top-k then softmax",
      reference=reference,
    )
    assert found.failures == []
