"""The bodies of the kernels for few experts on TPUs.

A vector is one expert's [8, 128]: 1,024 tokens, so that nothing is reduced
inside of a vector and every lane and sublane is of use. With many experts this
order has too many vectors; tpu_forward.py is for them.

Arrays of tokens are [tiles, M / 16, 128], as XLA has [M, rows] in memory with
tokens on lanes: a tile is eight rows, of 128 tokens after the other. A row's
tokens so lie in every eighth of M / 16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.topk_routing import lanes as vec
from aquila_jax.kernels.topk_routing import total_order
from aquila_jax.kernels.topk_routing.grid import KernelShape
from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES
from aquila_jax.kernels.topk_routing.tpu_forward import triangle

# The most experts, and chosen ones, of a token.
MOST = 16
MOST_CHOSEN = 8
# Tokens of a vector.
UNIT = SUBLANES * LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShape(KernelShape):
  """What the kernels are compiled for."""

  tokens: int  # a tile; a multiple of UNIT
  has_bias: bool = False
  steps_per_piece: int = 1


class _Rows:
  """Rows of an array [tiles, T / 16, 128] in VMEM, 1,024 tokens at once."""

  def __init__(self, ref):
    self.ref = ref

  def _at(self, row: int, unit):
    tile, sublane = divmod(row, SUBLANES)
    first = unit * SUBLANES * SUBLANES + sublane
    here = pl.ds(first, SUBLANES, stride=SUBLANES)
    return pl.ds(tile, 1), here, slice(None)

  def load(self, row: int, unit) -> jax.Array:
    """The row's 1,024 tokens, [8, 128]."""
    return self.ref[self._at(row, unit)][0]

  def store(self, row: int, unit, value: jax.Array) -> None:
    """Puts them there."""
    self.ref[self._at(row, unit)] = value[None]


def _units(shape: FewShape, body) -> None:
  """body(unit) for every 1,024 tokens of the tile; `unit` may be traced."""
  vec.loop(shape.tokens // UNIT, body)


def _valid(ref, unit) -> jax.Array | None:
  return None if ref is None else ref[vec.part(unit, SUBLANES), :] > 0


class ForwardRefs:
  """The forward kernel's arguments by name."""

  def __init__(self, shape: FewShape, refs):
    left = iter(refs)

    def rows():
      return _Rows(next(left))

    self.logits = rows()  # float [E T]
    self.bias = next(left) if shape.has_bias else None  # float [E], in SMEM
    self.valid = next(left) if shape.has_valid else None  # int [T/128 128]
    self.experts = rows()  # int [8 T]; output, as are the following
    self.gates = rows()  # float [8 T]
    self.positions = rows()  # int [8 T]
    self.chosen = rows()  # float [8 T]
    self.logsumexp = next(left)  # float [T/128 128]
    self.counts = next(left)  # int [E 8 128], of the core so far
    self.probability = next(left)  # float [E 8 128]
    self.scalars = next(left)  # float [2 8 128]; z and entropy
    self.ranks = next(left)  # float [E 8 128]; assignments so far, of the core
    self.triangle = next(left)  # bfloat16 [128 256]
    self.above = next(left)  # bfloat16 [16 E, 8 E]
    assert not list(left)


def scratch(shape: FewShape) -> list[Any]:
  """VMEM from one tile to the next."""
  rows = SUBLANES * shape.num_experts
  return [
    pltpu.VMEM((shape.num_experts, SUBLANES, LANES), jnp.float32),
    pltpu.VMEM((LANES, 2 * LANES), jnp.bfloat16),
    pltpu.VMEM((2 * rows, rows), jnp.bfloat16),
  ]


def forward(*refs, shape: FewShape) -> None:
  """One tile of tokens of one core; tiles come in order."""
  ref = ForwardRefs(shape, refs)
  step = pl.program_id(1)
  in_piece = jax.lax.rem(step, shape.steps_per_piece)

  @pl.when(step == 0)
  def _():
    ref.ranks[...] = jnp.zeros_like(ref.ranks)
    ref.triangle[...] = triangle()
    ref.above[...] = _sublanes(shape.num_experts)

  @pl.when(in_piece == 0)
  def _():
    ref.probability[...] = jnp.zeros_like(ref.probability)
    ref.scalars[...] = jnp.zeros_like(ref.scalars)

  _units(shape, lambda unit: _choose(ref, shape, unit))
  _units(shape, lambda unit: _place(ref, shape, unit))

  @pl.when(in_piece == shape.steps_per_piece - 1)
  def _():
    ref.counts[...] = ref.ranks[...].astype(jnp.int32)


def _choose(ref: ForwardRefs, shape: FewShape, unit) -> None:
  """Experts and gates, and sums over tokens."""
  rule = shape.rule
  x = [ref.logits.load(e, unit) for e in range(shape.num_experts)]
  valid = _valid(ref.valid, unit)
  largest = x[0]
  for other in x[1:]:
    largest = jnp.maximum(largest, other)
  exps = [jnp.exp(one - largest) for one in x]
  total = _sum(exps)
  logsumexp = largest + jnp.log(total)
  scores = exps
  if rule.order == "sigmoid":
    scores, logs = zip(*map(vec.sigmoid, x), strict=True)
    total = _sum(scores)
  else:
    logs = [jnp.maximum(one - largest, vec.LEAST) for one in x]
  inverse = 1 / total
  product = _sum([s * log for s, log in zip(scores, logs, strict=True)])
  _add_sums(ref, valid, scores, inverse, product, total, logsumexp)

  ranks = x
  if ref.bias is not None:
    if rule.order == "softmax_then_topk":
      ranks = [s * inverse for s in scores]
    elif rule.order == "sigmoid":
      ranks = list(scores)
    ranks = [rank + ref.bias[e] for e, rank in enumerate(ranks)]
  experts = _best(ranks, rule.top_k)
  chosen = [_at(x, expert) for expert in experts]
  gates = rule.scoring.gates(jnp.stack(chosen), logsumexp[None], axis=0)
  for j, expert in enumerate(experts):
    gate = gates[j]
    if valid is not None:
      gate = jnp.where(valid, gate, 0.0)
    ref.experts.store(j, unit, expert)
    ref.chosen.store(j, unit, chosen[j])
    ref.gates.store(j, unit, gate)
  ref.logsumexp[vec.part(unit, SUBLANES), :] = logsumexp


def _sum(values) -> jax.Array:
  total = values[0]
  for value in values[1:]:
    total = total + value
  return total


def _add_sums(ref, valid, scores, inverse, product, total, logsumexp) -> None:
  # -sum P log P of P = scores / total.
  entropy = jnp.log(total) - product * inverse
  square = logsumexp * logsumexp
  if valid is not None:
    # Not products: what padding holds may not be finite.
    entropy = jnp.where(valid, entropy, 0.0)
    square = jnp.where(valid, square, 0.0)
  ref.scalars[0] += square
  ref.scalars[1] += entropy
  for e, score in enumerate(scores):
    probability = score * inverse
    if valid is not None:
      probability = jnp.where(valid, probability, 0.0)
    ref.probability[e] += probability


def _best(ranks: list[jax.Array], top_k: int) -> list[jax.Array]:
  """The experts of the largest ranks, best first, lower ones first on ties."""
  # NO_KEY is below all: of the one NaN that has it, the next is as good.
  keys = [
    jnp.maximum(total_order.key(rank), total_order.NO_KEY + 1) for rank in ranks
  ]
  experts = []
  for j in range(top_k):
    best, expert = keys[0], jnp.zeros_like(keys[0])
    for e, key in enumerate(keys[1:], 1):
      better = key > best
      best = jnp.where(better, key, best)
      expert = jnp.where(better, e, expert)
    experts.append(expert)
    if j < top_k - 1:
      keys = [
        jnp.where(expert == e, total_order.NO_KEY, key)
        for e, key in enumerate(keys)
      ]
  return experts


def _at(values: list[jax.Array], expert: jax.Array) -> jax.Array:
  """What each token's expert has."""
  found = values[0]
  for e, value in enumerate(values[1:], 1):
    found = jnp.where(expert == e, value, found)
  return found


def _place(ref: ForwardRefs, shape: FewShape, unit) -> None:
  """As in tpu_forward.py; tokens go on from one sublane to the next."""
  num_experts, top_k = shape.num_experts, shape.rule.top_k
  experts = [ref.experts.load(j, unit) for j in range(top_k)]
  valid = _valid(ref.valid, unit)
  chosen = []
  for e in range(num_experts):
    is_chosen = experts[0] == e
    for expert in experts[1:]:
      is_chosen = is_chosen | (expert == e)
    if valid is not None:
      is_chosen = is_chosen & valid
    chosen.append(jnp.where(is_chosen, 1.0, 0.0))
  flat = jnp.concatenate(chosen).astype(jnp.bfloat16)
  along = jnp.dot(
    flat, ref.triangle[...], preferred_element_type=jnp.float32
  )  # [8 E, 256]; earlier on the sublane, and all of it
  down = jnp.dot(
    ref.above[...],
    # At most 128, which bfloat16 has exactly.
    along[:, LANES:].astype(jnp.bfloat16),
    preferred_element_type=jnp.float32,
  )  # [16 E, 128]; sublanes above, and all of them
  ranks = []
  for e in range(num_experts):
    rows = slice(SUBLANES * e, SUBLANES * (e + 1))
    so_far = ref.ranks[e]
    ranks.append(along[rows, :LANES] + down[rows] + so_far)
    all_rows = SUBLANES * num_experts
    ref.ranks[e] = so_far + down[all_rows + rows.start : all_rows + rows.stop]
  for j, expert in enumerate(experts):
    positions = _at(ranks, expert).astype(jnp.int32)
    if valid is not None:
      positions = jnp.where(valid, positions, -1)
    ref.positions.store(j, unit, positions)


def _sublanes(num_experts: int) -> jax.Array:
  """[16 E, 8 E]: ones at sublanes above of the same expert; and at all."""
  rows = SUBLANES * num_experts
  row = jax.lax.broadcasted_iota(jnp.int32, (2 * rows, rows), 0)
  column = jax.lax.broadcasted_iota(jnp.int32, (2 * rows, rows), 1)
  is_all = row >= rows
  row = jnp.where(is_all, row - rows, row)
  same = (row >> 3) == (column >> 3)
  return jnp.where(same & (is_all | (column < row)), 1.0, 0.0).astype(
    jnp.bfloat16
  )


def shift(
  before_ref, experts_ref, positions_ref, out_ref, *, shape: FewShape
) -> None:
  """Adds the assignments `before` of other cores, float [E], in SMEM."""
  core = pl.program_id(0)
  experts_of, positions_of, out = map(
    _Rows, (experts_ref, positions_ref, out_ref)
  )

  def some(unit):
    for j in range(shape.rule.top_k):
      expert = experts_of.load(j, unit)
      positions = positions_of.load(j, unit)
      before = jnp.zeros_like(positions)
      for e in range(shape.num_experts):
        before = jnp.where(expert == e, before_ref[core, e], before)
      out.store(
        j, unit, jnp.where(positions < 0, positions, positions + before)
      )

  _units(shape, some)


class BackwardRefs:
  """The backward kernel's arguments by name."""

  def __init__(self, shape: FewShape, refs):
    left = iter(refs)

    def rows():
      return _Rows(next(left))

    self.z_grad = next(left)  # float [1 1], in SMEM
    self.probability_grad = next(left)  # float [B E], in SMEM
    self.logits = rows()  # float [E T]
    self.valid = next(left) if shape.has_valid else None  # int [T/128 128]
    self.experts = rows()  # int [8 T]
    self.gates = rows()  # float [8 T]
    self.chosen = rows()  # float [8 T]
    self.logsumexp = next(left)  # float [T/128 128]
    self.gates_grad = rows()  # float [8 T]
    self.logits_grad = rows()  # float [E T]; output
    assert not list(left)


def backward(*refs, shape: FewShape, tiles_per_row: int) -> None:
  """One tile of tokens; reference.py has the formulas."""
  ref = BackwardRefs(shape, refs)
  row = jax.lax.div(pl.program_id(0), tiles_per_row)
  _units(shape, lambda unit: _gradient(ref, shape, unit, row))


def _gradient(ref: BackwardRefs, shape: FewShape, unit, row) -> None:
  rule, top_k = shape.rule, shape.rule.top_k
  every = range(shape.num_experts)

  def slots(rows: _Rows) -> jax.Array:
    return jnp.stack([rows.load(j, unit) for j in range(top_k)])

  at_chosen, everywhere = rule.scoring.gate_gradients(
    slots(ref.gates),
    slots(ref.gates_grad),
    chosen=slots(ref.chosen),
    axis=0,
  )
  logsumexp = ref.logsumexp[vec.part(unit, SUBLANES), :]
  everywhere = everywhere[0] + 2 * ref.z_grad[0, 0] * logsumexp
  x = [ref.logits.load(e, unit) for e in every]
  grads = [ref.probability_grad[row, e] for e in every]
  p = [jnp.exp(one - logsumexp) for one in x]
  if rule.order == "sigmoid":
    scores = [vec.sigmoid(one)[0] for one in x]
    inverse = 1 / jnp.maximum(_sum(scores), jnp.finfo(jnp.float32).tiny)
    mean = _sum([s * g for s, g in zip(scores, grads, strict=True)]) * inverse
    out = [
      p[e] * everywhere
      + scores[e] * inverse * (1 - scores[e]) * (grads[e] - mean)
      for e in every
    ]
  else:
    mean = _sum([p[e] * grads[e] for e in every])
    everywhere = everywhere - mean
    out = [p[e] * (everywhere + grads[e]) for e in every]
  experts = [ref.experts.load(j, unit) for j in range(top_k)]
  valid = _valid(ref.valid, unit)
  for e in every:
    grad, extra = out[e], jnp.zeros_like(logsumexp)
    for j, expert in enumerate(experts):
      extra = jnp.where(expert == e, at_chosen[j], extra)
    grad = grad + extra
    if valid is not None:
      grad = jnp.where(valid, grad, 0.0)
    ref.logits_grad.store(e, unit, grad)
