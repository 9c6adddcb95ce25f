"""A mixture of experts as a loop over tokens, in NumPy and float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aquila_jax.core.model_config import MoeConfig

Leaves = Mapping[str, np.ndarray]


def leaves_of(params: Leaves) -> dict[str, np.ndarray]:
  """The leaves of all FFNs, by what stands behind layers/mlp."""
  start = "layers/mlp/"
  return {
    name.removeprefix(start): leaf
    for name, leaf in params.items()
    if name.startswith(start)
  }


def ffn(
  x: np.ndarray, leaves: Leaves, layer: int, moe: MoeConfig | None
) -> np.ndarray:
  """What the FFN of a layer gives for rows x, [M D]."""
  if moe is None:
    kernels = ("gate_kernel", "up_kernel", "down_kernel")
    return _swiglu(x, *(leaves[name][layer] for name in kernels))
  return np.stack([_token(row, leaves, layer, moe) for row in x])


def _swiglu(x, gate, up, down):
  hidden = x @ gate
  return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def _softmax(x: np.ndarray) -> np.ndarray:
  powers = np.exp(x - x.max())
  return powers / powers.sum()


def choice(logits: np.ndarray, moe: MoeConfig) -> list[tuple[int, float]]:
  """The experts of a token and their gates; the lowest wins on ties."""
  ranked = sorted(range(len(logits)), key=lambda e: (-logits[e], e))
  chosen = ranked[: moe.top_k]
  if moe.router_order == "topk_then_softmax":
    gates = _softmax(logits[chosen])
  else:
    gates = _softmax(logits)[chosen]
    if moe.renormalise:
      gates = gates / gates.sum()
  return list(zip(chosen, gates, strict=True))


def _token(
  x: np.ndarray, leaves: Leaves, layer: int, moe: MoeConfig
) -> np.ndarray:
  out = np.zeros_like(x)
  for expert, gate in choice(x @ leaves["router/kernel"][layer], moe):
    kernels = (
      leaves[name][layer, expert]
      for name in ("gate_kernel", "up_kernel", "down_kernel")
    )
    out += gate * _swiglu(x, *kernels)
  if moe.shared_expert_dim:
    shared = _swiglu(
      x,
      *(
        leaves[f"shared/{name}"][layer]
        for name in ("gate_kernel", "up_kernel", "down_kernel")
      ),
    )
    if moe.shared_expert_gate:
      score = x @ leaves["shared/token_gate_kernel"][layer]
      shared = shared / (1 + np.exp(-score))
    out += shared
  return out
