"""Makes the checkpoints of this folder with transformers.

They are kept in the repository, so that tests need neither torch nor
transformers. To make them again, where both are installed (last with torch 2.13
and transformers 5.24):

  python -m tests.interop.references.make

Each is a directory as `save_pretrained` writes it, of random weights, and
expected.npz: `ids` [2, T], the float32 `logits` [2, T, V] that transformers
computes for them, and `prompt`, how many of the ids of row 0 were given; the
others are its greedy continuation.
"""

from __future__ import annotations

import importlib
import pathlib
import shutil
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
LENGTH, PROMPT = 20, 6
SIZES: dict[str, Any] = dict(
  vocab_size=61,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  initializer_range=0.4,
  eos_token_id=None,
  bos_token_id=None,
  pad_token_id=None,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=2.0)
QWEN_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=8)
# The name of a directory -> class and what its config differs in. Windows are
# shorter than LENGTH, so that they are seen.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
  "llama": ("Llama", {}),
  "llama_bias": (
    "Llama",
    dict(attention_bias=True, tie_word_embeddings=True, head_dim=6),
  ),
  "llama_llama3": ("Llama", dict(head_dim=8, rope_parameters=LLAMA3)),
  "llama_linear": ("Llama", dict(rope_parameters=LINEAR)),
  "mistral": ("Mistral", dict(sliding_window=None, head_dim=8)),
  "mistral_window": ("Mistral", dict(sliding_window=7)),
  "qwen2": ("Qwen2", {}),
  "qwen2_window": (
    "Qwen2",
    dict(
      use_sliding_window=True,
      sliding_window=5,
      max_window_layers=0,
      tie_word_embeddings=True,
    ),
  ),
  "qwen3": ("Qwen3", dict(head_dim=8)),
  "qwen3_bias": ("Qwen3", dict(head_dim=6, attention_bias=True)),
  "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
  "mixtral_window": (
    "Mixtral",
    dict(num_local_experts=3, num_experts_per_tok=2, sliding_window=6),
  ),
  "qwen2_moe": (
    "Qwen2Moe",
    dict(num_experts=4, shared_expert_intermediate_size=12, **QWEN_MOE),
  ),
  "qwen2_moe_norm": (
    "Qwen2Moe",
    dict(
      num_experts=4,
      shared_expert_intermediate_size=12,
      norm_topk_prob=True,
      qkv_bias=False,
      **QWEN_MOE,
    ),
  ),
  "qwen3_moe": (
    "Qwen3Moe",
    dict(num_local_experts=4, head_dim=6, norm_topk_prob=True, **QWEN_MOE),
  ),
  "qwen3_moe_window": (
    "Qwen3Moe",
    dict(
      num_local_experts=4,
      head_dim=6,
      norm_topk_prob=False,
      use_sliding_window=True,
      sliding_window=9,
      **QWEN_MOE,
    ),
  ),
  # Experts in some layers: every second, and all but the first.
  "qwen2_moe_mixed": (
    "Qwen2Moe",
    dict(
      num_experts=4,
      shared_expert_intermediate_size=12,
      num_hidden_layers=4,
      intermediate_size=8,
      decoder_sparse_step=2,
      **QWEN_MOE,
    ),
  ),
  "qwen3_moe_mixed": (
    "Qwen3Moe",
    dict(
      num_local_experts=4,
      head_dim=6,
      norm_topk_prob=True,
      num_hidden_layers=3,
      intermediate_size=8,
      mlp_only_layers=[0],
      **QWEN_MOE,
    ),
  ),
}


def make(name: str, *, torch: Any, transformers: Any) -> None:
  """Writes one directory."""
  family, changes = KINDS[name]
  config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
  cls = getattr(transformers, f"{family}ForCausalLM")
  model = cls(config).float()
  for parameter_name, parameter in model.named_parameters():
    # Biases and scales are not special, nor is a router small.
    mean = float(parameter.ndim == 1 and "norm" in parameter_name)
    torch.nn.init.normal_(parameter, mean, 0.4)
  directory = HERE / name
  shutil.rmtree(directory, ignore_errors=True)
  # Half the bytes, and exact in float32; one comes in several files.
  shard = "4KB" if name == "llama_bias" else "1GB"
  model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard)
  model = cls.from_pretrained(directory, dtype=torch.float32).eval()
  generator = np.random.default_rng(0)
  ids = generator.integers(0, SIZES["vocab_size"], (2, LENGTH))
  for place in range(PROMPT, LENGTH):
    logits = model(torch.tensor(ids[:1, :place])).logits[0, -1].numpy()
    second, first = np.sort(logits)[-2:]
    assert first - second > 1e-3, "a tie: choose another seed"
    ids[0, place] = logits.argmax()
  np.savez(
    directory / "expected.npz",
    ids=ids.astype(np.int32),
    logits=model(torch.tensor(ids)).logits.numpy(),
    prompt=PROMPT,
  )


def main() -> None:
  torch: Any = importlib.import_module("torch")
  transformers: Any = importlib.import_module("transformers")
  torch.set_grad_enabled(False)
  for seed, name in enumerate(KINDS):
    torch.manual_seed(seed)
    make(name, torch=torch, transformers=transformers)


if __name__ == "__main__":
  main()
