"""Experts choose tokens.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368,
section 3. With scores S [M E] of the router's order, every expert takes the C
tokens of a batch that it scores highest, C = ceil(A M / E), so that a token
meets A experts in the mean and no expert more than another; some tokens meet
none. The gates are the scores.

Whom an expert takes depends on all tokens of the batch, later ones included:
training sees the future, and a text cannot be continued token by token as it
was trained (models/causality.py).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.types import Leaf
from aquila_jax.layers.moe.dispatch import Dispatch, Meetings
from aquila_jax.layers.moe.losses import RoutingSums, summed
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.layers.moe.selection import rule


class ExpertDispatch(struct.PyTreeNode):
  """Experts have chosen. A block is all slots of an expert: P = E, Q = C."""

  tokens: Leaf  # int [E C]; in a slot; M where the slot is empty
  gates: Leaf  # float [E C]; 0 where the slot is empty
  block_expert: Leaf  # int [E]
  num_blocks: Leaf  # int []
  valid: Leaf  # bool [M]

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "E C D"]:
    return jnp.take(x, self.tokens, axis=0, mode="fill", fill_value=0)

  def combine(self, rows: Float[Array, "E C D"]) -> Float[Array, "M D"]:
    """By a scatter: a token has any number of slots."""
    weighted = rows * self.gates[..., None].astype(rows.dtype)
    out = jnp.zeros((self.valid.shape[0], rows.shape[-1]), rows.dtype)
    return out.at[self.tokens].add(weighted, mode="drop")

  def meetings(self) -> Meetings:
    """`dropped` are valid tokens that meet no expert."""
    (num_experts, _), num_tokens = self.tokens.shape, self.valid.shape[0]
    every = jnp.arange(num_experts, dtype=self.block_expert.dtype)
    pairs = (self.tokens, every[:, None])
    shape = (num_tokens, num_experts)
    assigned = jnp.zeros(shape, bool).at[pairs].set(True, mode="drop")
    gates = (
      jnp.zeros(shape, self.gates.dtype).at[pairs].set(self.gates, mode="drop")
    )
    alone = self.valid & ~jnp.any(assigned, axis=1)
    return Meetings(
      assigned=assigned,
      ids=jnp.where(assigned, every[None], -1),
      top_gate=jnp.max(gates, axis=-1),
      dropped=jnp.sum(alone).astype(gates.dtype),
    )


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
  """Every expert takes as many tokens."""

  config: MoeConfig

  def dispatch(
    self, affinity: Affinity, *, num_rows: int
  ) -> tuple[Dispatch, RoutingSums]:
    num_tokens, num_experts = affinity.logits.shape
    capacity = math.ceil(self.config.top_k * num_tokens / num_experts)
    scoring = rule(self.config).scoring
    scores = scoring.scores(affinity.logits)
    # Padding comes last, and is then thrown out.
    ranks = jnp.where(affinity.valid[:, None], scores, -jnp.inf)
    ranks = jax.lax.stop_gradient(ranks).T  # (M, E) -> (E, M)
    _, tokens = jax.lax.top_k(ranks, capacity)
    taken = affinity.valid[tokens]
    gates = jnp.take_along_axis(scores.T, tokens, axis=1)
    plan = ExpertDispatch(
      tokens=jnp.where(taken, tokens, num_tokens),
      gates=jnp.where(taken, self.config.gate_scale * gates, 0.0),
      block_expert=jnp.arange(num_experts, dtype=jnp.int32),
      num_blocks=jnp.asarray(num_experts, jnp.int32),
      valid=affinity.valid,
    )
    sums = summed(
      affinity,
      scoring.probability(affinity.logits),
      assigned=plan.meetings().assigned,
      num_rows=num_rows,
    )
    return plan, sums
