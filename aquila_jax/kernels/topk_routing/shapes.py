"""Shapes of models in use, for tests, benchmarks and the tuner."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """Experts, and those of a token."""

  num_experts: int
  top_k: int

  def __str__(self) -> str:
    return f"{self.num_experts}/{self.top_k}"


# Mixtral; OLMoE; DeepSeek-V3, whose groups are left out; Kimi-K2.
NAMED = (
  Workload(num_experts=8, top_k=2),
  Workload(num_experts=64, top_k=8),
  Workload(num_experts=256, top_k=8),
  Workload(num_experts=384, top_k=8),
)
