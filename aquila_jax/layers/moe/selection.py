"""Tokens choose experts: top-k of the scores, of biased ones, within groups."""

from __future__ import annotations

from flax import struct

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.types import Leaf
from aquila_jax.kernels.topk_routing.api import topk_routing
from aquila_jax.kernels.topk_routing.rule import Routed, RoutingRule
from aquila_jax.layers.moe.router import Affinity


class Routing(struct.PyTreeNode):
  """The experts of M tokens."""

  experts: Leaf  # int [M A]; chosen experts, best first
  gates: Leaf  # float [M A]; their weights, at least float32
  valid: Leaf  # bool [M]; False for padding: no place, no count
  positions: Leaf  # int [M A]; earlier tokens with the same expert
  counts: Leaf  # int [E]; tokens of an expert


def rule(config: MoeConfig) -> RoutingRule:
  """How tokens choose under `config`."""
  return RoutingRule(
    top_k=config.top_k,
    order=config.router_order,
    renormalise=config.renormalise,
    gate_scale=config.gate_scale,
    num_groups=config.num_groups,
    top_groups=config.top_groups,
    group_score=config.group_score,
  )


def route(
  affinity: Affinity, config: MoeConfig, *, num_rows: int = 1
) -> Routed:
  """The `top_k` experts of every token, with places and sums over rows.

  kernels/topk_routing has the definition. With `use_routing_kernel` it runs the
  kernel of the platform, where there is one.

  Args:
    affinity: of the router.
    config: order, k, groups.
    num_rows: B; the tokens are as many rows.

  Returns:
    The routing; the gates of padding are 0.
  """
  return topk_routing(
    affinity.logits,
    rule(config),
    bias=affinity.bias,
    valid=affinity.valid,
    num_rows=num_rows,
    implementation=None if config.use_routing_kernel else "xla",
  )


def choose(affinity: Affinity, config: MoeConfig) -> Routing:
  """`route`, without the sums."""
  return routing(route(affinity, config), affinity)


def routing(routed: Routed, affinity: Affinity) -> Routing:
  """What a placement needs of `route`."""
  return Routing(
    experts=routed.experts,
    gates=routed.gates,
    valid=affinity.valid,
    positions=routed.positions,
    counts=routed.counts.sum(axis=0, dtype=routed.counts.dtype),
  )
