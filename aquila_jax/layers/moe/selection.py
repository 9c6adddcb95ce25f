"""Tokens choose experts: top-k of the scores, of biased ones, within groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.types import Leaf
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.layers.moe.scoring import make_scoring


class Routing(struct.PyTreeNode):
  """The experts of M tokens."""

  experts: Leaf  # int [M A]; chosen experts, best first
  gates: Leaf  # float [M A]; their weights, at least float32
  valid: Leaf  # bool [M]; False for padding: no place, no count
  num_experts: int = struct.field(pytree_node=False)


def choose(affinity: Affinity, config: MoeConfig) -> Routing:
  """The `top_k` experts of every token, and their gates.

  With scores s of the router's order and the selection bias b, a token goes to
  the largest s + b; its gates are of s alone (loss-free balancing, arXiv
  2408.15664, eq. 3). With topk_then_softmax s are the logits.

  With fewer `top_groups` than `num_groups` the experts are taken from the best
  groups of neighbours, by the largest s + b in a group (DeepSeek-V2, arXiv
  2405.04434, section 2.2.2) or the sum of its two largest (DeepSeek-V3). Where
  the groups are the experts of a device, so many devices hear of a token.

  On ties the lowest expert, or group, wins, as in `jax.lax.top_k`.

  Args:
    affinity: of the router.
    config: order, k, groups.

  Returns:
    The choice; the gates of padding are 0.
  """
  scoring = make_scoring(config)
  ranks = scoring.scores(affinity.logits)
  if affinity.bias is not None:
    ranks = ranks + affinity.bias[None]
  if config.top_groups < config.num_groups:
    allowed = _in_best_groups(ranks, config)
    ranks = jnp.where(allowed, ranks, -jnp.inf)
  # The choice has no gradient; the gates have theirs through the scores.
  _, experts = jax.lax.top_k(jax.lax.stop_gradient(ranks), config.top_k)
  gates = scoring.gates(affinity.logits, experts)
  gates = jnp.where(affinity.valid[:, None], gates, jnp.zeros((), gates.dtype))
  return Routing(
    experts=experts,
    gates=gates,
    valid=affinity.valid,
    num_experts=config.num_experts,
  )


def _in_best_groups(
  ranks: Float[Array, "M E"], config: MoeConfig
) -> Bool[Array, "M E"]:
  """True for the experts of a token's `top_groups` best groups."""
  num_tokens, num_experts = ranks.shape
  groups = ranks.reshape(num_tokens, config.num_groups, -1)
  counted = {"max": 1, "top2_sum": 2}[config.group_score]
  best, _ = jax.lax.top_k(groups, counted)
  _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), config.top_groups)
  # Ids against ids, since a scatter is slow: (M, A', 1) == (1, 1, groups)
  every = jnp.arange(config.num_groups, dtype=chosen.dtype)
  allowed = jnp.any(chosen[:, :, None] == every[None, None], axis=1)
  return jnp.repeat(allowed, num_experts // config.num_groups, axis=1)
