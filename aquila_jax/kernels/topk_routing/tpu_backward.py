"""The body of the backward kernel for TPUs; reference.py has the formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.topk_routing import lanes as vec
from aquila_jax.kernels.topk_routing.grid import KernelShape
from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardShape(KernelShape):
  """What the backward kernel is compiled for."""

  tokens: int  # a tile
  width: int  # lanes a loop

  @property
  def is_sigmoid(self) -> bool:
    """Whether probabilities are not the softmax."""
    return self.rule.order == "sigmoid"


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
    self.everywhere = next(left)  # float [8 T]; the same in each row
    self.mean = next(left)  # float [8 T]; likewise
    self.scale = next(left)  # float [8 T]; scores to probabilities
    self.p = next(left)  # float [E T]; softmax, and then the gradient
    self.scores = next(left) if shape.is_sigmoid else self.p  # float [E T]
    assert not list(left)


def scratch(shape: BackwardShape) -> list[Any]:
  """VMEM for what lies between the phases."""
  rows = shape.num_tiles * SUBLANES
  all_experts = pltpu.VMEM((rows, shape.tokens), jnp.float32)
  vector = pltpu.VMEM((SUBLANES, shape.tokens), jnp.float32)
  return [
    pltpu.VMEM((shape.slots, shape.tokens), jnp.float32),
    vector,
    vector,
    vector,
    all_experts,
    *([all_experts] if shape.is_sigmoid else []),
  ]


def kernel(*refs, shape: BackwardShape) -> None:
  """One tile of tokens.

  Two loops: in one, all experts' softmax would stay in registers.
  """
  ref = Refs(shape, refs)
  for body in (_means, _gradients):
    vec.loop(
      shape.tokens // shape.width,
      lambda i, body=body: body(ref, shape, vec.part(i, shape.width)),
    )


def _means(ref: Refs, shape: BackwardShape, lanes) -> None:
  """What all logits of a token have in common, and their softmax."""
  size = (SUBLANES, shape.width)
  logsumexp = ref.logsumexp[:, lanes]
  slot = jax.lax.broadcasted_iota(jnp.int32, (shape.slots, shape.width), 0)
  used = slot < shape.rule.top_k

  def chosen(values):
    return jnp.where(used, values[:, lanes], 0.0)

  at_chosen, everywhere = shape.rule.scoring.gate_gradients(
    chosen(ref.gates),
    chosen(ref.gates_grad),
    chosen=chosen(ref.chosen),
    axis=0,
  )
  everywhere = everywhere + 2 * ref.z_grad[0, 0] * logsumexp
  ref.everywhere[:, lanes] = jnp.broadcast_to(everywhere, size)
  ref.at_chosen[:, lanes] = at_chosen
  logsumexp = jnp.broadcast_to(logsumexp, size)
  mean, total = jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32)
  for t, x in enumerate(_logits(ref, shape, lanes)):
    p = jnp.exp(x - logsumexp)
    ref.p[vec.part(t, SUBLANES), lanes] = p
    score = p
    if shape.is_sigmoid:
      score = jax.nn.sigmoid(x)
      ref.scores[vec.part(t, SUBLANES), lanes] = score
      total = total + score
    mean = mean + score * _probability_grad(ref, shape, t)
  mean = vec.over_sublanes(jnp.add, mean)
  if shape.is_sigmoid:
    total = vec.over_sublanes(jnp.add, total)
    scale = 1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    mean = mean * scale
    # Probabilities are the scores times the scale, which stays where it is.
    ref.scale[:, lanes] = scale
  ref.mean[:, lanes] = mean


def _logits(ref: Refs, shape: BackwardShape, lanes):
  """Tile by tile in float32; -inf below the last expert."""
  x = ref.logits[:, lanes].astype(jnp.float32)
  for t in range(shape.num_tiles):
    tile = x[vec.part(t, SUBLANES)]
    if SUBLANES * (t + 1) > shape.num_experts:
      row = vec.rows(shape.width) + SUBLANES * t
      tile = jnp.where(row < shape.num_experts, tile, -jnp.inf)
    yield tile


def _probability_grad(ref: Refs, shape: BackwardShape, t: int) -> jax.Array:
  copies = shape.width // LANES
  return jnp.concatenate(
    [ref.probability_grad[vec.part(t, SUBLANES)]] * copies, axis=1
  )


def _gradients(ref: Refs, shape: BackwardShape, lanes) -> None:
  everywhere, mean = ref.everywhere[:, lanes], ref.mean[:, lanes]
  for t in range(shape.num_tiles):
    p, grad = (
      ref.p[vec.part(t, SUBLANES), lanes],
      _probability_grad(ref, shape, t),
    )
    if shape.is_sigmoid:
      score = ref.scores[vec.part(t, SUBLANES), lanes]
      scaled = score * ref.scale[:, lanes]
      out = p * everywhere + scaled * (1 - score) * (grad - mean)
    else:
      out = p * (everywhere - mean + grad)
    ref.p[vec.part(t, SUBLANES), lanes] = out
  _add_at_chosen(ref, shape, lanes)
  grad = ref.p[: ref.logits_grad.shape[0], lanes]
  if ref.valid is not None:
    grad = jnp.where(ref.valid[:, lanes] > 0, grad, 0.0)
  ref.logits_grad[: grad.shape[0], lanes] = grad.astype(ref.logits_grad.dtype)


def _add_at_chosen(ref, shape: BackwardShape, lanes) -> None:
  sublane = vec.rows(shape.width)

  def add(i, count=SUBLANES):
    """What the slots of one vector of them have, up to `count`."""
    here = vec.part(i, SUBLANES), lanes
    experts, values = ref.experts[here], ref.at_chosen[here]
    slots = [
      (
        jnp.broadcast_to(experts[j : j + 1], sublane.shape) - sublane,
        jnp.broadcast_to(values[j : j + 1], sublane.shape),
      )
      for j in range(count)
    ]
    for t in range(shape.num_tiles):
      extra = jnp.zeros(sublane.shape, jnp.float32)
      for ahead, value in slots:
        extra = jnp.where(ahead == SUBLANES * t, value, extra)
      ref.p[vec.part(t, SUBLANES), lanes] += extra

  whole, rest = divmod(shape.rule.top_k, SUBLANES)
  if whole:
    vec.loop(whole, add)
  if rest:
    add(whole, rest)
