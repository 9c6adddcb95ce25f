"""What a routing is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import struct

from aquila_jax.core.model_config import RouterOrder
from aquila_jax.core.types import Leaf
from aquila_jax.kernels.topk_routing.scoring import Scoring, make_scoring

# What the kernels were written and tested for.
_MOST_EXPERTS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingRule:
  """How tokens choose experts; MoeConfig has the same fields."""

  top_k: int  # A
  order: RouterOrder = "topk_then_softmax"
  renormalise: bool = True
  gate_scale: float = 1.0
  num_groups: int = 1
  top_groups: int = 1
  group_score: Literal["max", "top2_sum"] = "max"

  @property
  def scoring(self) -> Scoring:
    """Scores, probabilities and gates of the order."""
    return make_scoring(
      self.order, renormalise=self.renormalise, gate_scale=self.gate_scale
    )

  @property
  def limits_groups(self) -> bool:
    """Whether experts of some groups are out of reach of a token."""
    return self.top_groups < self.num_groups


def beyond_kernels(
  rule: RoutingRule, dtype: jnp.dtype, num_experts: int
) -> str | None:
  """What of it the reference alone can do, on any device; None is nothing."""
  if rule.limits_groups:
    return f"top_groups={rule.top_groups} of num_groups={rule.num_groups}"
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"logits of {dtype}"
  if num_experts > _MOST_EXPERTS:
    return f"num_experts={num_experts}, above {_MOST_EXPERTS}"
  return None


class Routed(struct.PyTreeNode):
  """The routing of M tokens in B rows to E experts, A of them a token.

  Padding (`valid` is False) has gates of 0 and positions of -1, and is in none
  of the counts and sums; its experts are those of its logits.
  """

  experts: Leaf  # int32 [M A]; the chosen, best first
  gates: Leaf  # float [M A]; their weights
  # int32 [M A]; how many earlier tokens have chosen the same expert
  positions: Leaf
  counts: Leaf  # int32 [B E]; the row's tokens that have chosen the expert
  probability: Leaf  # float [B E]; sum over the row's tokens of P
  z: Leaf  # float []; sum over tokens of logsumexp(logits)^2
  entropy: Leaf  # float []; sum over tokens of -sum_i P_i log P_i; no gradient


class Residuals(struct.PyTreeNode):
  """What a backward pass needs of a forward pass."""

  logits: Leaf  # [M E], as they were given
  valid: Leaf | None  # bool [M]
  experts: Leaf  # int32 [M A]
  gates: Leaf  # float [M A]
  chosen: Leaf  # float [M A]; logits of the chosen
  logsumexp: Leaf  # float [M]; of the logits


class Gradients(struct.PyTreeNode):
  """Of what in `Routed` carries a gradient."""

  gates: Leaf  # float [M A]
  probability: Leaf  # float [B E]
  z: Leaf  # float []
