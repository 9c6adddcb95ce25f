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


def choice(
  logits: np.ndarray, moe: MoeConfig, bias: np.ndarray | None = None
) -> list[tuple[int, float]]:
  """The experts of a token and their gates; the lowest wins on ties."""
  scores = {
    "topk_then_softmax": lambda: logits,
    "softmax_then_topk": lambda: _softmax(logits),
    "sigmoid": lambda: 1 / (1 + np.exp(-logits)),
  }[moe.router_order]()
  ranks = scores if bias is None else scores + bias
  allowed = _best_groups(ranks, moe)
  ranked = sorted(allowed, key=lambda e: (-ranks[e], e))
  chosen = ranked[: moe.top_k]
  gates = scores[chosen]
  if moe.router_order == "topk_then_softmax":
    gates = _softmax(gates)
  elif moe.renormalise:
    gates = gates / gates.sum()
  return list(zip(chosen, moe.gate_scale * gates, strict=True))


def _best_groups(ranks: np.ndarray, moe: MoeConfig) -> list[int]:
  """The experts of the best groups."""
  groups = np.arange(len(ranks)).reshape(moe.num_groups, -1)
  counted = {"max": 1, "top2_sum": 2}[moe.group_score]

  def score(group: int) -> float:
    return np.sort(ranks[groups[group]])[-counted:].sum()

  best = sorted(range(moe.num_groups), key=lambda g: (-score(g), g))
  return [int(e) for g in best[: moe.top_groups] for e in groups[g]]


def _token(
  x: np.ndarray, leaves: Leaves, layer: int, moe: MoeConfig
) -> np.ndarray:
  out = np.zeros_like(x)
  bias = leaves.get("router/selection_bias")
  for expert, gate in choice(
    x @ leaves["router/kernel"][layer],
    moe,
    None if bias is None else bias[layer],
  ):
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
