"""What other formats call the tensors of a decoder.

Keys are the leaves of DecoderLM, joined by dots. Facts of the formats: the
tensors that transformers and vLLM read (model.safetensors), and those that
llama.cpp reads (GGUF).
"""

from __future__ import annotations

_HF_LAYER = "model.layers.{layer}."

_HF_COMMON = {
  "embedding.table": "model.embed_tokens.weight",
  "final_norm.scale": "model.norm.weight",
  "lm_head.kernel": "lm_head.weight",
  "layers.attention_norm.scale": _HF_LAYER + "input_layernorm.weight",
  "layers.mlp_norm.scale": _HF_LAYER + "post_attention_layernorm.weight",
  "layers.attention.query_kernel": _HF_LAYER + "self_attn.q_proj.weight",
  "layers.attention.key_kernel": _HF_LAYER + "self_attn.k_proj.weight",
  "layers.attention.value_kernel": _HF_LAYER + "self_attn.v_proj.weight",
  "layers.attention.out_kernel": _HF_LAYER + "self_attn.o_proj.weight",
  "layers.attention.query_bias": _HF_LAYER + "self_attn.q_proj.bias",
  "layers.attention.key_bias": _HF_LAYER + "self_attn.k_proj.bias",
  "layers.attention.value_bias": _HF_LAYER + "self_attn.v_proj.bias",
  "layers.attention.out_bias": _HF_LAYER + "self_attn.o_proj.bias",
  "layers.attention.query_norm.scale": _HF_LAYER + "self_attn.q_norm.weight",
  "layers.attention.key_norm.scale": _HF_LAYER + "self_attn.k_norm.weight",
}

HF_DENSE = _HF_COMMON | {
  "layers.mlp.gate_kernel": _HF_LAYER + "mlp.gate_proj.weight",
  "layers.mlp.up_kernel": _HF_LAYER + "mlp.up_proj.weight",
  "layers.mlp.down_kernel": _HF_LAYER + "mlp.down_proj.weight",
}

_HF_MIXTRAL = _HF_LAYER + "block_sparse_moe."
HF_MIXTRAL = _HF_COMMON | {
  "layers.mlp.router.kernel": _HF_MIXTRAL + "gate.weight",
  "layers.mlp.gate_kernel": _HF_MIXTRAL + "experts.{expert}.w1.weight",
  "layers.mlp.up_kernel": _HF_MIXTRAL + "experts.{expert}.w3.weight",
  "layers.mlp.down_kernel": _HF_MIXTRAL + "experts.{expert}.w2.weight",
}

_HF_EXPERT = _HF_LAYER + "mlp.experts.{expert}."
_HF_SHARED = _HF_LAYER + "mlp.shared_expert."
HF_QWEN_MOE = _HF_COMMON | {
  "layers.mlp.router.kernel": _HF_LAYER + "mlp.gate.weight",
  "layers.mlp.gate_kernel": _HF_EXPERT + "gate_proj.weight",
  "layers.mlp.up_kernel": _HF_EXPERT + "up_proj.weight",
  "layers.mlp.down_kernel": _HF_EXPERT + "down_proj.weight",
  "layers.mlp.shared.gate_kernel": _HF_SHARED + "gate_proj.weight",
  "layers.mlp.shared.up_kernel": _HF_SHARED + "up_proj.weight",
  "layers.mlp.shared.down_kernel": _HF_SHARED + "down_proj.weight",
  "layers.mlp.shared.token_gate_kernel": (
    _HF_LAYER + "mlp.shared_expert_gate.weight"
  ),
  # Of the layers without experts, where some have none.
  "layers.dense_mlp.gate_kernel": _HF_LAYER + "mlp.gate_proj.weight",
  "layers.dense_mlp.up_kernel": _HF_LAYER + "mlp.up_proj.weight",
  "layers.dense_mlp.down_kernel": _HF_LAYER + "mlp.down_proj.weight",
}

_GGUF_LAYER = "blk.{layer}."
_GGUF_COMMON = {
  "embedding.table": "token_embd.weight",
  "final_norm.scale": "output_norm.weight",
  "lm_head.kernel": "output.weight",
  "layers.attention_norm.scale": _GGUF_LAYER + "attn_norm.weight",
  "layers.mlp_norm.scale": _GGUF_LAYER + "ffn_norm.weight",
  "layers.attention.query_kernel": _GGUF_LAYER + "attn_q.weight",
  "layers.attention.key_kernel": _GGUF_LAYER + "attn_k.weight",
  "layers.attention.value_kernel": _GGUF_LAYER + "attn_v.weight",
  "layers.attention.out_kernel": _GGUF_LAYER + "attn_output.weight",
  "layers.attention.query_bias": _GGUF_LAYER + "attn_q.bias",
  "layers.attention.key_bias": _GGUF_LAYER + "attn_k.bias",
  "layers.attention.value_bias": _GGUF_LAYER + "attn_v.bias",
  "layers.attention.out_bias": _GGUF_LAYER + "attn_output.bias",
  "layers.attention.query_norm.scale": _GGUF_LAYER + "attn_q_norm.weight",
  "layers.attention.key_norm.scale": _GGUF_LAYER + "attn_k_norm.weight",
}

GGUF_DENSE = _GGUF_COMMON | {
  "layers.mlp.gate_kernel": _GGUF_LAYER + "ffn_gate.weight",
  "layers.mlp.up_kernel": _GGUF_LAYER + "ffn_up.weight",
  "layers.mlp.down_kernel": _GGUF_LAYER + "ffn_down.weight",
}

# The experts of a layer are one tensor.
GGUF_MOE = _GGUF_COMMON | {
  "layers.mlp.router.kernel": _GGUF_LAYER + "ffn_gate_inp.weight",
  "layers.mlp.gate_kernel": _GGUF_LAYER + "ffn_gate_exps.weight",
  "layers.mlp.up_kernel": _GGUF_LAYER + "ffn_up_exps.weight",
  "layers.mlp.down_kernel": _GGUF_LAYER + "ffn_down_exps.weight",
  "layers.mlp.shared.gate_kernel": _GGUF_LAYER + "ffn_gate_shexp.weight",
  "layers.mlp.shared.up_kernel": _GGUF_LAYER + "ffn_up_shexp.weight",
  "layers.mlp.shared.down_kernel": _GGUF_LAYER + "ffn_down_shexp.weight",
  "layers.mlp.shared.token_gate_kernel": (
    _GGUF_LAYER + "ffn_gate_inp_shexp.weight"
  ),
}
