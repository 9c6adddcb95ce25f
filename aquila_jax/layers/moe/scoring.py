"""Router orders: what experts are ranked by, and what a gate is made of.

  name                ranked by      gates of the chosen A
  topk_then_softmax   logits         softmax over the chosen logits (Mixtral,
                                     arXiv 2401.04088, section 2.1)
  softmax_then_topk   softmax        as they are, or over their sum (Switch,
                                     arXiv 2101.03961; GShard, arXiv 2006.16668)
  sigmoid             sigmoid        as they are, or over their sum
                                     (DeepSeek-V3, arXiv 2412.19437, eqs. 13-15)

All gates are then multiplied by `gate_scale` (their "routed scaling factor").
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core.model_config import MoeConfig


@runtime_checkable
class Scoring(Protocol):
  """One of the orders. M tokens, E experts, A of them chosen a token."""

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    """What experts are ranked by; it rises with a token's logits."""
    ...

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    """Sums to one over the experts; what the losses take for P."""
    ...

  def gates(
    self, logits: Float[Array, "M E"], experts: Int[Array, "M A"]
  ) -> Float[Array, "M A"]:
    """The weights of the chosen experts."""
    ...


@dataclasses.dataclass(frozen=True)
class TopkThenSoftmax:
  """The gates compare the chosen experts alone, and sum to `gate_scale`."""

  gate_scale: float

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return logits

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return jax.nn.softmax(logits, axis=-1)

  def gates(
    self, logits: Float[Array, "M E"], experts: Int[Array, "M A"]
  ) -> Float[Array, "M A"]:
    chosen = jnp.take_along_axis(logits, experts, axis=-1)
    return self.gate_scale * jax.nn.softmax(chosen, axis=-1)


@dataclasses.dataclass(frozen=True)
class SoftmaxThenTopk:
  """The gates compare all experts."""

  gate_scale: float
  renormalise: bool

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return jax.nn.softmax(logits, axis=-1)

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return self.scores(logits)

  def gates(
    self, logits: Float[Array, "M E"], experts: Int[Array, "M A"]
  ) -> Float[Array, "M A"]:
    chosen = jnp.take_along_axis(self.scores(logits), experts, axis=-1)
    return self.gate_scale * _over_sum(chosen, self.renormalise)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
  """Each expert is scored by itself."""

  gate_scale: float
  renormalise: bool

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return jax.nn.sigmoid(logits)

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    """The scores over their sum (arXiv 2412.19437, eq. 19)."""
    return _over_sum(self.scores(logits), True)

  def gates(
    self, logits: Float[Array, "M E"], experts: Int[Array, "M A"]
  ) -> Float[Array, "M A"]:
    chosen = jnp.take_along_axis(self.scores(logits), experts, axis=-1)
    return self.gate_scale * _over_sum(chosen, self.renormalise)


_ORDERS = {
  "topk_then_softmax": lambda moe: TopkThenSoftmax(moe.gate_scale),
  "softmax_then_topk": lambda moe: SoftmaxThenTopk(
    moe.gate_scale, moe.renormalise
  ),
  "sigmoid": lambda moe: Sigmoid(moe.gate_scale, moe.renormalise),
}


def make_scoring(config: MoeConfig) -> Scoring:
  """The order that `config` asks for."""
  return _ORDERS[config.router_order](config)


def _over_sum(values: Float[Array, "M N"], wanted: bool) -> Float[Array, "M N"]:
  if not wanted:
    return values
  total = jnp.sum(values, axis=-1, keepdims=True)
  # A bias or a limit to groups may choose experts whose scores are all 0.
  return values / jnp.maximum(total, jnp.finfo(values.dtype).tiny)
