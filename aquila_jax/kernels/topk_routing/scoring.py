"""Router orders: what experts are ranked by, and what a gate is made of.

  name                ranked by      gates of the chosen A
  topk_then_softmax   logits         softmax over the chosen logits (Mixtral,
                                     arXiv 2401.04088, section 2.1)
  softmax_then_topk   softmax        as they are, or over their sum (Switch,
                                     arXiv 2101.03961; GShard, arXiv 2006.16668)
  sigmoid             sigmoid        as they are, or over their sum
                                     (DeepSeek-V3, arXiv 2412.19437, eqs. 13-15)

All gates are then multiplied by `gate_scale` (their "routed scaling factor").

`gate_gradients` are the derivatives of the gates, written out: what a backward
kernel needs. Of dx, the gradient of a token's logits, the gates' part is

  dx_i = sum_j [i = experts_j] at_chosen_j + everywhere * p_i

with p the softmax over all E.

Gates and their gradients are elementwise but for sums over the chosen, which
lie along `axis`: kernels have tokens last.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core.model_config import RouterOrder


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
    self, chosen: jax.Array, logsumexp: jax.Array, *, axis: int
  ) -> jax.Array:
    """Of the chosen logits, and the logsumexp of all with `axis` of size 1."""
    ...

  def gate_gradients(
    self,
    gates: jax.Array,
    gates_grad: jax.Array,
    *,
    chosen: jax.Array,
    axis: int,
  ) -> tuple[jax.Array, jax.Array]:
    """`at_chosen`, and `everywhere` with `axis` of size 1."""
    ...


@dataclasses.dataclass(frozen=True)
class TopkThenSoftmax:
  """The gates compare the chosen experts alone, and sum to `gate_scale`."""

  gate_scale: float

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return logits

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return jax.nn.softmax(logits, axis=-1)

  def gates(self, chosen, logsumexp, *, axis):
    del logsumexp
    largest = jnp.max(chosen, axis=axis, keepdims=True)
    return self.gate_scale * _over_sum(jnp.exp(chosen - largest), axis)

  def gate_gradients(self, gates, gates_grad, *, chosen, axis):
    del chosen
    return _less_mean(gates, gates_grad, self.gate_scale, axis)


@dataclasses.dataclass(frozen=True)
class SoftmaxThenTopk:
  """The gates compare all experts."""

  gate_scale: float
  renormalise: bool

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return jax.nn.softmax(logits, axis=-1)

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return self.scores(logits)

  def gates(self, chosen, logsumexp, *, axis):
    scores = jnp.exp(chosen - logsumexp)
    if self.renormalise:
      scores = _over_sum(scores, axis)
    return self.gate_scale * scores

  def gate_gradients(self, gates, gates_grad, *, chosen, axis):
    del chosen
    if self.renormalise:
      # Scores over their sum are a softmax over the chosen.
      return _less_mean(gates, gates_grad, self.gate_scale, axis)
    weighted = gates * gates_grad
    return weighted, -jnp.sum(weighted, axis=axis, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
  """Each expert is scored by itself."""

  gate_scale: float
  renormalise: bool

  def scores(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    return jax.nn.sigmoid(logits)

  def probability(self, logits: Float[Array, "M E"]) -> Float[Array, "M E"]:
    """The scores over their sum (arXiv 2412.19437, eq. 19)."""
    return _over_sum(self.scores(logits), -1)

  def gates(self, chosen, logsumexp, *, axis):
    del logsumexp
    scores = jax.nn.sigmoid(chosen)
    if self.renormalise:
      scores = _over_sum(scores, axis)
    return self.gate_scale * scores

  def gate_gradients(self, gates, gates_grad, *, chosen, axis):
    if self.renormalise:
      weighted, none = _less_mean(gates, gates_grad, self.gate_scale, axis)
    else:
      weighted = gates * gates_grad
      none = jnp.zeros_like(jnp.sum(weighted, axis=axis, keepdims=True))
    return weighted * (1 - jax.nn.sigmoid(chosen)), none


def make_scoring(
  order: RouterOrder, *, renormalise: bool = True, gate_scale: float = 1.0
) -> Scoring:
  """The order of that name; topk_then_softmax is normalised in any case."""
  if order == "topk_then_softmax":
    return TopkThenSoftmax(gate_scale)
  if order == "softmax_then_topk":
    return SoftmaxThenTopk(gate_scale, renormalise)
  assert order == "sigmoid", order
  return Sigmoid(gate_scale, renormalise)


def _over_sum(values: jax.Array, axis: int) -> jax.Array:
  total = jnp.sum(values, axis=axis, keepdims=True)
  # A bias or a limit to groups may choose experts whose scores are all 0.
  return values / jnp.maximum(total, jnp.finfo(values.dtype).tiny)


def _less_mean(gates, gates_grad, gate_scale: float, axis: int):
  """Of g_j = scale s_j / sum s, with ds_j / dx_j = s_j: g (dg - mean dg)."""
  mean = jnp.sum(gates * gates_grad, axis=axis, keepdims=True) / gate_scale
  return gates * (gates_grad - mean), jnp.zeros_like(mean)
