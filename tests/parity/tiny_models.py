"""Random models of stock transformers, small, with weights of no special kind.

Norms are not ones and biases not zeros, so that one that is dropped shows; the
weights are large, so that routing and attention are far from uniform.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

_SIZES = dict(
  vocab_size=256,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  max_position_embeddings=256,
  initializer_range=0.15,
)


def build(name: str, options: dict[str, Any], path: pathlib.Path) -> None:
  """Writes a random model of the class `name`ForCausalLM."""
  sizes: dict[str, Any] = _SIZES | {}
  if name == "Qwen2Moe":
    sizes |= dict(
      num_experts=6,
      moe_intermediate_size=24,
      shared_expert_intermediate_size=40,
    )
  if name == "Qwen3Moe":
    sizes |= dict(
      num_local_experts=6, num_experts_per_tok=3, moe_intermediate_size=24
    )
  config = getattr(transformers, f"{name}Config")(**(sizes | options))
  torch.manual_seed(0)
  model = getattr(transformers, f"{name}ForCausalLM")(config).float()
  for key, parameter in model.named_parameters():
    if parameter.ndim == 1:
      torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.2)
    elif "gate.weight" in key or "experts" in key:
      torch.nn.init.normal_(parameter, 0.0, 0.2)
  model.save_pretrained(path)
