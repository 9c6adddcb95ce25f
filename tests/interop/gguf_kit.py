"""GGUF files of a checkpoint, written as llama.cpp's converter does."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from tests.interop import tiny

Type = gguf.GGMLQuantizationType

_ARCHITECTURES = {
  "llama": "llama",
  "mistral": "llama",
  "mixtral": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "qwen2_moe": "qwen2moe",
  "qwen3_moe": "qwen3moe",
}
_NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "mlp.gate": "ffn_gate_inp",
  "block_sparse_moe.gate": "ffn_gate_inp",
  "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
  "mlp.shared_expert.up_proj": "ffn_up_shexp",
  "mlp.shared_expert.down_proj": "ffn_down_shexp",
  "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERTS = {
  **dict(w1="ffn_gate_exps", w3="ffn_up_exps", w2="ffn_down_exps"),
  **dict(gate_proj="ffn_gate_exps", up_proj="ffn_up_exps"),
  "down_proj": "ffn_down_exps",
}


def interleaved(value: np.ndarray, *, heads: int) -> np.ndarray:
  """Rows of Q or K so that the pairs that RoPE turns are neighbours."""
  size = len(value) // heads
  out = np.empty_like(value)
  for head in range(heads):
    for i in range(size // 2):
      for half in range(2):
        source = head * size + half * (size // 2) + i
        out[head * size + 2 * i + half] = value[source]
  return out


def tensors_of(name: str) -> dict[str, np.ndarray]:
  """The tensors of a reference under GGUF's names, in float32."""
  folder = tiny.REFERENCES / name
  held: dict[str, np.ndarray] = {}
  for file in folder.glob("*.safetensors"):
    held |= safetensors.numpy.load_file(file)
  config = tiny.read_json(folder / "config.json")
  is_llama = _ARCHITECTURES[config["model_type"]] == "llama"
  found: dict[str, np.ndarray] = {}
  experts: dict[str, dict[int, np.ndarray]] = {}
  for key, tensor in held.items():
    value = tensor.astype(np.float32)
    stem, kind = key.rsplit(".", 1)
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
    if layer is None:
      found[f"{_NAMES[stem]}.{kind}"] = value
      continue
    number, part = layer.groups()
    expert = re.match(r".*\.experts\.(\d+)\.(\w+)", part)
    if expert is not None:
      stacked = experts.setdefault(f"blk.{number}.{_EXPERTS[expert[2]]}", {})
      stacked[int(expert[1])] = value
      continue
    if is_llama and part.endswith(("q_proj", "k_proj")):
      which = "num_attention_heads" if "q_proj" in part else None
      value = interleaved(value, heads=config[which or "num_key_value_heads"])
    if part == "mlp.shared_expert_gate":
      value = value[0]
    found[f"blk.{number}.{_NAMES[part]}.{kind}"] = value
  for key, stacked in experts.items():
    found[f"{key}.weight"] = np.stack([stacked[i] for i in range(len(stacked))])
  return found


def metadata_of(name: str) -> dict[str, Any]:
  """The metadata of a reference; floats are written as float32."""
  config = tiny.read_json(tiny.REFERENCES / name / "config.json")
  rope = config["rope_parameters"]
  values: dict[str, Any] = {
    "block_count": config["num_hidden_layers"],
    "context_length": config["max_position_embeddings"],
    "embedding_length": config["hidden_size"],
    "feed_forward_length": config["intermediate_size"],
    "attention.head_count": config["num_attention_heads"],
    "attention.head_count_kv": config["num_key_value_heads"],
    "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    "rope.freq_base": rope["rope_theta"],
    "vocab_size": config["vocab_size"],
  }
  if config.get("head_dim"):
    values["attention.key_length"] = config["head_dim"]
    values["attention.value_length"] = config["head_dim"]
    values["rope.dimension_count"] = config["head_dim"]
  if config.get("sliding_window"):
    values["attention.sliding_window"] = config["sliding_window"]
  if rope["rope_type"] == "linear":
    values["rope.scaling.type"] = "linear"
    values["rope.scaling.factor"] = rope["factor"]
  num_experts = config.get("num_experts", config.get("num_local_experts"))
  if num_experts:
    values["expert_count"] = num_experts
    values["expert_used_count"] = config["num_experts_per_tok"]
  if "moe_intermediate_size" in config:
    values["expert_feed_forward_length"] = config["moe_intermediate_size"]
  if "shared_expert_intermediate_size" in config:
    values["expert_shared_feed_forward_length"] = config[
      "shared_expert_intermediate_size"
    ]
  architecture = _ARCHITECTURES[config["model_type"]]
  return {"general.architecture": architecture} | {
    f"{architecture}.{key}": value for key, value in values.items()
  }


def write(
  path: pathlib.Path,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  types: Mapping[str, Type] | Type = Type.F32,
) -> pathlib.Path:
  """Writes a GGUF file.

  Args:
    path: the file.
    metadata: all keys; None leaves one out.
    tensors: float32, by name.
    types: of the matrices, or by name; vectors are kept in float32.

  Returns:
    `path`.
  """
  writer = gguf.GGUFWriter(path, metadata["general.architecture"])
  for key, value in metadata.items():
    if key == "general.architecture" or value is None:
      continue
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    else:
      writer.add_array(key, value)
  for name, tensor in tensors.items():
    kind = types if isinstance(types, Type) else types.get(name, Type.F32)
    if tensor.ndim == 1 or kind == Type.F32:
      writer.add_tensor(name, tensor)
    elif kind == Type.F64:
      writer.add_tensor(name, tensor.astype(np.float64))
    else:
      writer.add_tensor(
        name, gguf.quants.quantize(tensor, kind), raw_dtype=kind
      )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_reference(
  path: pathlib.Path,
  name: str,
  *,
  types: Type = Type.F32,
  **changes: Any,
) -> pathlib.Path:
  """Writes a reference; `__` stands for a dot in the keys of `changes`."""
  changed = {key.replace("__", "."): value for key, value in changes.items()}
  return write(path, metadata_of(name) | changed, tensors_of(name), types=types)
