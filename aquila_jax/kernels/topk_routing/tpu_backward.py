"""The body of the backward kernel for TPUs; reference.py has the formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.topk_routing import lanes as vec
from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES
from aquila_jax.kernels.topk_routing.rule import RoutingRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardShape:
  """What a kernel is compiled for."""

  rule: RoutingRule
  num_experts: int
  tokens: int  # a tile
  width: int  # lanes a loop
  has_valid: bool

  @property
  def num_tiles(self) -> int:
    """Vectors that the experts of a token fill."""
    return -(-self.num_experts // SUBLANES)

  @property
  def slots(self) -> int:
    """The chosen experts of a token, rounded up to whole vectors."""
    return -(-self.rule.top_k // SUBLANES) * SUBLANES


class Refs:
  """The kernel's arguments by name; None where there is none."""

  def __init__(self, shape: BackwardShape, refs):
    left = iter(refs)
    self.z_grad = next(left)  # float [1 1], in SMEM
    self.logits = next(left)  # float [E T]
    self.valid = next(left) if shape.has_valid else None  # int [1 T]
    self.experts = next(left)  # int [slots T]
    self.gates = next(left)  # float [slots T]
    self.chosen = next(left)  # float [slots T]
    self.logsumexp = next(left)  # float [1 T]
    self.gates_grad = next(left)  # float [slots T]
    self.probability_grad = next(left)  # float [E 128], the same in each lane
    self.logits_grad = next(left)  # float [E T]; output
    self.at_chosen = next(left)  # float [slots T]
    self.x = next(left)  # float [E T]; logits in float32, then their gradient
    assert not list(left)


def scratch(shape: BackwardShape) -> list[Any]:
  """VMEM for what lies between the phases."""
  rows = shape.num_tiles * SUBLANES
  return [
    pltpu.VMEM((shape.slots, shape.tokens), jnp.float32),
    pltpu.VMEM((rows, shape.tokens), jnp.float32),
  ]


def kernel(*refs, shape: BackwardShape) -> None:
  """One tile of tokens."""
  ref = Refs(shape, refs)

  def one(i, carry):
    start = pl.multiple_of(i * shape.width, LANES)
    _some_lanes(ref, shape, pl.ds(start, shape.width))
    return carry

  jax.lax.fori_loop(0, shape.tokens // shape.width, one, 0)


def _some_lanes(ref: Refs, shape: BackwardShape, lanes) -> None:
  size = (SUBLANES, shape.width)
  scoring = shape.rule.scoring
  logsumexp = ref.logsumexp[:, lanes]
  slot = jax.lax.broadcasted_iota(jnp.int32, (shape.slots, shape.width), 0)
  used = slot < shape.rule.top_k

  def chosen(values):
    return jnp.where(used, values[:, lanes], 0.0)

  at_chosen, everywhere = scoring.gate_gradients(
    chosen(ref.gates),
    chosen(ref.gates_grad),
    chosen=chosen(ref.chosen),
    axis=0,
  )
  everywhere = everywhere + 2 * ref.z_grad[0, 0] * logsumexp
  everywhere = jnp.broadcast_to(everywhere, size)
  logsumexp = jnp.broadcast_to(logsumexp, size)
  ref.at_chosen[:, lanes] = at_chosen
  ref.x[:, lanes] = ref.logits[:, lanes].astype(jnp.float32)
  _everywhere(ref, shape, lanes, everywhere, logsumexp)
  _add_at_chosen(ref, shape, lanes)
  grad = ref.x[:, lanes]
  if ref.valid is not None:
    grad = jnp.where(ref.valid[:, lanes] > 0, grad, 0.0)
  ref.logits_grad[:, lanes] = grad.astype(ref.logits_grad.dtype)


def _tile(t: int) -> slice:
  return slice(SUBLANES * t, SUBLANES * (t + 1))


def _everywhere(ref, shape: BackwardShape, lanes, everywhere, logsumexp):
  """What every logit gets, in the place of the logits."""
  copies = shape.width // LANES

  def of(t):
    """Softmax, score, and the score's derivative over itself."""
    x = ref.x[_tile(t), lanes]
    p = jnp.exp(x - logsumexp)
    row = vec.rows(shape.width) + SUBLANES * t
    if SUBLANES * (t + 1) > shape.num_experts:
      p = jnp.where(row < shape.num_experts, p, 0.0)
    if shape.rule.order != "sigmoid":
      return p, p, jnp.ones_like(p)
    score = jax.nn.sigmoid(x)
    if SUBLANES * (t + 1) > shape.num_experts:
      score = jnp.where(row < shape.num_experts, score, 0.0)
    return p, score, 1 - score

  mean = jnp.zeros_like(logsumexp)
  total = jnp.zeros_like(logsumexp)
  for t in range(shape.num_tiles):
    _, probability, _ = of(t)
    grad = jnp.concatenate([ref.probability_grad[_tile(t)]] * copies, axis=1)
    mean = mean + probability * grad
    total = total + probability
  mean = vec.over_sublanes(jnp.add, mean)
  scale = None
  if shape.rule.order == "sigmoid":
    total = vec.over_sublanes(jnp.add, total)
    scale = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    mean = mean * scale
  for t in range(shape.num_tiles):
    p, probability, slope = of(t)
    grad = jnp.concatenate([ref.probability_grad[_tile(t)]] * copies, axis=1)
    if scale is None:
      out = p * (everywhere + grad - mean)
    else:
      out = p * everywhere + probability * scale * slope * (grad - mean)
    ref.x[_tile(t), lanes] = out


def _add_at_chosen(ref, shape: BackwardShape, lanes) -> None:
  sublane = vec.rows(shape.width)

  def eight(start, count):
    """Where they are, less the sublane, and what to add there."""
    here = pl.ds(start, SUBLANES)
    experts, values = ref.experts[here, lanes], ref.at_chosen[here, lanes]
    return [
      (
        jnp.broadcast_to(experts[j : j + 1], sublane.shape) - sublane,
        jnp.broadcast_to(values[j : j + 1], sublane.shape),
      )
      for j in range(count)
    ]

  def add(slots):
    for t in range(shape.num_tiles):
      extra = jnp.zeros(sublane.shape, jnp.float32)
      for ahead, value in slots:
        extra = jnp.where(ahead == SUBLANES * t, value, extra)
      ref.x[_tile(t), lanes] += extra

  whole, rest = divmod(shape.rule.top_k, SUBLANES)
  if whole == 1:
    add(eight(0, SUBLANES))
  elif whole > 1:

    def one(i, carry):
      add(eight(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES))
      return carry

    jax.lax.fori_loop(0, whole, one, 0)
  if rest:
    add(eight(whole * SUBLANES, rest))
