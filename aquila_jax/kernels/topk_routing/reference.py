"""Top-k routing in plain XLA: the oracle, and what runs where no kernel does.

Nothing is as large as tokens x chosen x experts: who has chosen whom is one
[M E] mask, and its prefix sums over tokens are products with a triangle, in
blocks, and a short cumulative sum over the blocks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from aquila_jax.core import dtypes
from aquila_jax.kernels.topk_routing.rule import (
  Gradients,
  Residuals,
  Routed,
  RoutingRule,
)

# Tokens a block of the prefix sums.
_BLOCK = 128
# Up to so many chosen experts have an operation each.
_UNROLLED = 16


@dataclasses.dataclass(frozen=True)
class Xla:
  """The backend; api.py has its interface."""

  def unsupported(
    self, rule: RoutingRule, dtype: jnp.dtype, num_experts: int
  ) -> str | None:
    """It can do everything."""
    del rule, dtype, num_experts
    return None

  def forward(
    self,
    logits: Float[Array, "M E"],
    rule: RoutingRule,
    *,
    bias: Float[Array, "E"] | None,
    valid: Bool[Array, "M"] | None,
    num_rows: int,
  ) -> tuple[Routed, Residuals]:
    """See api.topk_routing."""
    given = logits
    # At least float32: a softmax, and sums over many tokens.
    logits = logits.astype(dtypes.at_least_float32(logits.dtype))
    lse = jax.nn.logsumexp(logits, axis=-1)
    chosen, experts = _choice(logits, rule, bias=bias)
    gates = rule.scoring.gates(chosen, lse[:, None], axis=-1)
    counted = chosen_by(experts, logits.shape[1])
    if valid is not None:
      gates = jnp.where(valid[:, None], gates, jnp.zeros((), gates.dtype))
      counted &= valid[:, None]
    positions, counts = _positions(experts, counted, num_rows=num_rows)
    probability = rule.scoring.probability(logits)
    entropy = -jnp.sum(
      jax.scipy.special.xlogy(probability, probability), axis=-1
    )
    square = jnp.square(lse)
    if valid is not None:
      positions = jnp.where(valid[:, None], positions, -1)
      # Not a product: what padding holds may not be finite.
      probability = jnp.where(valid[:, None], probability, 0.0)
      square = jnp.where(valid, square, 0.0)
      entropy = jnp.where(valid, entropy, 0.0)
    routed = Routed(
      experts=experts,
      gates=gates,
      positions=positions,
      counts=counts,
      probability=_by_row(probability, num_rows),
      z=jnp.sum(square),
      entropy=jnp.sum(entropy),
    )
    residuals = Residuals(
      logits=given,
      valid=valid,
      experts=experts,
      gates=gates,
      chosen=chosen,
      logsumexp=lse,
    )
    return routed, residuals

  def backward(
    self, residuals: Residuals, grads: Gradients, rule: RoutingRule
  ) -> Float[Array, "M E"]:
    """The gradient of the logits, in their dtype.

    With p = softmax(x), z = logsumexp(x), and P the order's probability:

      dx = gates' part (scoring.py) + 2 dz z p + P's part

    in which P's part is p (dP - sum_i p_i dP_i) for a softmax and, for P = s/S
    with s = sigmoid(x) and S its sum, P (1 - s) (dP - sum_i P_i dP_i).
    """
    dtype = residuals.gates.dtype
    x = residuals.logits.astype(dtype)
    num_tokens, num_experts = x.shape
    p = jnp.exp(x - residuals.logsumexp[:, None])
    dP = grads.probability.astype(dtype)
    dP = jnp.repeat(dP, num_tokens // dP.shape[0], axis=0)  # (B, E) -> (M, E)
    at_chosen, everywhere = rule.scoring.gate_gradients(
      residuals.gates,
      grads.gates.astype(dtype),
      chosen=residuals.chosen,
      axis=-1,
    )
    everywhere += 2 * grads.z.astype(dtype) * residuals.logsumexp[:, None]
    if rule.order == "sigmoid":
      P = rule.scoring.probability(x)
      mean = jnp.sum(P * dP, axis=-1, keepdims=True)
      dx = p * everywhere + P * (1 - jax.nn.sigmoid(x)) * (dP - mean)
    else:
      mean = jnp.sum(p * dP, axis=-1, keepdims=True)
      dx = p * (everywhere + dP - mean)
    dx += _scattered(at_chosen, residuals.experts, num_experts)
    if residuals.valid is not None:
      dx = jnp.where(residuals.valid[:, None], dx, 0.0)
    return dx.astype(residuals.logits.dtype)


def chosen_by(
  experts: Int[Array, "M A"], num_experts: int
) -> Bool[Array, "M E"]:
  """Whether a token has chosen an expert."""
  every, top_k = _every(num_experts), experts.shape[1]
  if top_k > _UNROLLED:
    # (M, A, 1) == (1, 1, E), fused into the reduction over A.
    return jnp.any(experts[:, :, None] == every[None], axis=1)
  chosen = experts[:, :1] == every
  for j in range(1, top_k):
    chosen |= experts[:, j : j + 1] == every
  return chosen


def _scattered(
  values: Float[Array, "M A"], experts: Int[Array, "M A"], num_experts: int
) -> Float[Array, "M E"]:
  """The transpose of `_at_experts`."""
  every, zero = _every(num_experts), jnp.zeros((), values.dtype)

  def add(total, slot):
    expert, value = slot
    here = expert[:, None] == every
    return total + jnp.where(here, value[:, None], zero), None

  total = jnp.zeros((values.shape[0], num_experts), values.dtype)
  if experts.shape[1] > _UNROLLED:
    return jax.lax.scan(add, total, (experts.T, values.T))[0]
  for slot in zip(experts.T, values.T, strict=True):
    total, _ = add(total, slot)
  return total


def _every(num_experts: int) -> Int[Array, "1 E"]:
  return jnp.arange(num_experts, dtype=jnp.int32)[None]


def _choice(
  logits: Float[Array, "M E"],
  rule: RoutingRule,
  *,
  bias: Float[Array, "E"] | None,
) -> tuple[Float[Array, "M A"], Int[Array, "M A"]]:
  """The chosen experts' logits, and their ids."""
  if bias is None and not rule.limits_groups:
    chosen, experts = jax.lax.top_k(logits, rule.top_k)
    return chosen, experts
  ranks = rule.scoring.scores(logits)
  if bias is not None:
    ranks += bias.astype(ranks.dtype)[None]
  if rule.limits_groups:
    ranks = jnp.where(_in_best_groups(ranks, rule), ranks, -jnp.inf)
  _, experts = jax.lax.top_k(ranks, rule.top_k)
  return _at_experts(logits, experts), experts


def _in_best_groups(
  ranks: Float[Array, "M E"], rule: RoutingRule
) -> Bool[Array, "M E"]:
  """True for the experts of a token's `top_groups` best groups."""
  num_tokens, num_experts = ranks.shape
  groups = ranks.reshape(num_tokens, rule.num_groups, -1)
  counted = {"max": 1, "top2_sum": 2}[rule.group_score]
  best, _ = jax.lax.top_k(groups, counted)
  _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), rule.top_groups)
  allowed = chosen_by(chosen, rule.num_groups)
  return jnp.repeat(allowed, num_experts // rule.num_groups, axis=1)


def _positions(
  experts: Int[Array, "M A"], counted: Bool[Array, "M E"], *, num_rows: int
) -> tuple[Int[Array, "M A"], Int[Array, "B E"]]:
  """Earlier tokens with the same expert; tokens of a row with an expert."""
  num_tokens, num_experts = counted.shape
  num_blocks = -(-num_tokens // _BLOCK)
  padding = ((0, num_blocks * _BLOCK - num_tokens), (0, 0))
  # float32 adds ones exactly, up to 2^24 of them.
  blocks = jnp.pad(counted, padding).reshape(num_blocks, _BLOCK, num_experts)
  blocks = blocks.astype(jnp.float32)
  earlier = jnp.tri(_BLOCK, k=-1, dtype=jnp.float32)
  inside = jnp.einsum("ts,bse->bte", earlier, blocks)
  totals = jnp.sum(blocks, axis=1).astype(jnp.int32)
  before = jnp.cumsum(totals, axis=0, dtype=jnp.int32) - totals
  ranks = inside.astype(jnp.int32) + before[:, None]
  ranks = ranks.reshape(-1, num_experts)[:num_tokens]
  positions = _at_experts(ranks, experts)
  return positions, _by_row(counted.astype(jnp.int32), num_rows)


def _at_experts(
  values: Shaped[Array, "M E"], experts: Int[Array, "M A"]
) -> Shaped[Array, "M A"]:
  """What a token's chosen experts have."""
  # A gather is the slowest thing that a TPU does, and the fastest elsewhere.
  return jax.lax.platform_dependent(
    values, experts, tpu=_by_comparison, default=_gathered
  )


def _gathered(values, experts):
  return jnp.take_along_axis(values, experts, axis=1)


def _by_comparison(values, experts):
  # Experts come first: a sum over them is one of whole vectors.
  every, zero = _every(values.shape[1]).T, jnp.zeros((), values.dtype)

  def of(slot):
    here = jnp.where(slot[None] == every, values.T, zero)
    return jnp.sum(here, axis=0, dtype=values.dtype)

  if experts.shape[1] > _UNROLLED:
    return jax.lax.map(of, experts.T).T
  return jnp.stack([of(slot) for slot in experts.T], axis=1)


def _by_row(values, num_rows: int):
  """Sums over the tokens of a row: [M E] -> [B E]."""
  rows = values.reshape(num_rows, -1, values.shape[-1])
  return jnp.sum(rows, axis=1, dtype=values.dtype)
