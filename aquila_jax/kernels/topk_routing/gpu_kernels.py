"""The bodies of the GPU's kernels: a program has some tokens, and all experts.

It takes its tokens in groups, one after the other: [T, E] of a group lies in
the registers of its warps, with T and E rounded up to powers of two. Experts
are chosen one after the other: the largest key that is left, of the experts
that have it the lowest. The positions of a program's tokens are prefix sums
within it; what programs before it have placed is added behind the kernel
(pallas_gpu.py), so that programs need no order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from aquila_jax.kernels.topk_routing import total_order
from aquila_jax.kernels.topk_routing.rule import RoutingRule

# Up to so many chosen experts have instructions of their own.
_UNROLLED = 8


def power_of_two(size: int) -> int:
  """The least that is not below `size`."""
  return 1 << (size - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """What a kernel is compiled for."""

  rule: RoutingRule
  num_experts: int
  row_tokens: int
  tokens: int  # a group
  groups: int  # a program
  has_bias: bool
  has_valid: bool

  @property
  def experts(self) -> int:
    """E of a group."""
    return power_of_two(self.num_experts)

  @property
  def slots(self) -> int:
    """A of a group."""
    return power_of_two(self.rule.top_k)

  @property
  def programs_per_row(self) -> int:
    """Those that share the tokens of a row."""
    return -(-self.row_tokens // self.program_tokens)

  @property
  def program_tokens(self) -> int:
    """Tokens of a program."""
    return self.tokens * self.groups


class _Group:
  """The part of the arrays that a group has, and how it is read and written.

  Rounding up has put more into it than there is: that is neither read nor
  written.
  """

  def __init__(self, shape: Shape, program: tuple[Any, Any], number):
    self.shape = shape
    self.row, program_in_row = program
    first = program_in_row * shape.program_tokens + number * shape.tokens
    start = self.row * shape.row_tokens + first
    self._tokens = pl.ds(start, shape.tokens)
    token = jnp.arange(shape.tokens, dtype=jnp.int32)
    self.is_token = token < shape.row_tokens - first  # [T]
    self.expert = jnp.arange(shape.experts, dtype=jnp.int32)[None]  # [1 E]
    self.is_expert = self.expert < shape.num_experts
    self.slot = jnp.arange(shape.slots, dtype=jnp.int32)[None]  # [1 A]
    self.is_slot = self.slot < shape.rule.top_k

  def of_tokens(self, ref, *, other=0):
    """[M] -> [T]."""
    at = ref.at[self._tokens]
    return plgpu.load(at, mask=self.is_token, other=other)

  def of_chosen(self, ref):
    """[M A] -> [T A]."""
    at = ref.at[self._tokens, pl.ds(0, self.shape.slots)]
    return plgpu.load(at, mask=self._chosen_mask, other=0)

  def of_experts(self, ref, *, other):
    """[M E] -> [T E], as float32."""
    at = ref.at[self._tokens, pl.ds(0, self.shape.experts)]
    return plgpu.load(at, mask=self._mask, other=other).astype(jnp.float32)

  def of_row(self, ref, row):
    """[B E] -> [1 E]."""
    at = ref.at[pl.ds(row, 1), pl.ds(0, self.shape.experts)]
    return plgpu.load(at, mask=self.is_expert, other=0)

  def store_tokens(self, ref, values) -> None:
    """[T] to its part of [M]."""
    plgpu.store(ref.at[self._tokens], values, mask=self.is_token)

  def store_chosen(self, ref, values) -> None:
    """[T A] to its part of [M A]."""
    at = ref.at[self._tokens, pl.ds(0, self.shape.slots)]
    plgpu.store(at, values.astype(ref.dtype), mask=self._chosen_mask)

  def store_experts(self, ref, values) -> None:
    """[T E] to its part of [M E]."""
    at = ref.at[self._tokens, pl.ds(0, self.shape.experts)]
    plgpu.store(at, values.astype(ref.dtype), mask=self._mask)

  @property
  def _mask(self):
    return self.is_token[:, None] & self.is_expert

  @property
  def _chosen_mask(self):
    return self.is_token[:, None] & self.is_slot


def _store_sums(shape: Shape, program: tuple[Any, Any], ref, sums) -> None:
  """[E] to the program's row of [programs E]."""
  row = program[0] * shape.programs_per_row + program[1]
  expert = jnp.arange(shape.experts, dtype=jnp.int32)
  plgpu.store(
    ref.at[row, pl.ds(0, shape.experts)], sums, mask=expert < shape.num_experts
  )


class _Arguments:
  """A kernel's references, one after the other."""

  def __init__(self, refs):
    self._left = list(refs)

  def next(self, is_there: bool = True):
    """The next; None where there is none."""
    return self._left.pop(0) if is_there else None


def forward(*refs, shape: Shape) -> None:
  """Everything of some tokens, with positions that count from the first."""
  arguments = _Arguments(refs)
  logits_ref = arguments.next()  # [M E]
  bias_ref = arguments.next(shape.has_bias)  # float [1 E]
  valid_ref = arguments.next(shape.has_valid)  # int8 [M]
  experts_ref = arguments.next()  # int [M A]
  gates_ref = arguments.next()  # float [M A]
  positions_ref = arguments.next()  # int [M A]
  chosen_ref = arguments.next()  # float [M A]
  logsumexp_ref = arguments.next()  # float [M]
  counts_ref = arguments.next()  # int [programs E]
  probability_ref = arguments.next()  # float [programs E]
  z_ref = arguments.next()  # float [M]; its part of the sum
  entropy_ref = arguments.next()  # float [M]; likewise

  # Not within a loop, where the interpreter has none.
  rule, program = shape.rule, (pl.program_id(0), pl.program_id(1))

  def one(number, carry):
    counts, probabilities = carry
    group = _Group(shape, program, number)
    logits = group.of_experts(logits_ref, other=-jnp.inf)
    largest = jnp.max(logits, axis=1)
    # Of -infinity and infinity alike: their difference from themselves is NaN.
    is_finite = jnp.abs(largest) < jnp.inf
    shift = jnp.where(is_finite, largest, 0.0)
    exp = jnp.exp(logits - shift[:, None])
    total = jnp.sum(exp, axis=1)
    logsumexp = jnp.log(total) + shift
    group.store_tokens(logsumexp_ref, logsumexp)
    probability = exp / total[:, None]
    scores = probability
    if rule.order == "sigmoid":
      scores = rule.scoring.scores(logits)
      probability = rule.scoring.probability(logits)
    ranks = logits
    if bias_ref is not None:
      if rule.order != "topk_then_softmax":
        ranks = scores
      ranks += group.of_row(bias_ref, 0)
    experts, chosen, is_chosen = _choose(group, ranks, logits)
    group.store_chosen(experts_ref, experts)
    group.store_chosen(chosen_ref, chosen)
    gates = rule.scoring.gates(
      jnp.where(group.is_slot, chosen, -jnp.inf), logsumexp[:, None], axis=1
    )

    counted = group.is_token
    if valid_ref is not None:
      counted &= group.of_tokens(valid_ref) != 0
    gates = jnp.where(counted[:, None], gates, 0.0)
    group.store_chosen(gates_ref, gates)
    ones = (is_chosen & counted[:, None]).astype(jnp.int32)
    earlier = jnp.cumsum(ones, axis=0) - ones + counts[None]

    def place(j, positions):
      expert = _slot(group, experts, j)
      here = jnp.where(group.expert == expert[:, None], earlier, 0)
      position = jnp.sum(here, axis=1)
      return jnp.where(group.slot == j, position[:, None], positions)

    positions = _each(rule.top_k, place, jnp.zeros_like(experts))
    positions = jnp.where(counted[:, None], positions, -1)
    group.store_chosen(positions_ref, positions)

    # Not a product: what padding holds may not be finite.
    probability = jnp.where(counted[:, None], probability, 0.0)
    log = jnp.log(jnp.where(probability == 0, 1.0, probability))
    group.store_tokens(entropy_ref, -jnp.sum(probability * log, axis=1))
    square = jnp.where(counted, logsumexp * logsumexp, 0.0)
    group.store_tokens(z_ref, square)
    return counts + jnp.sum(ones, axis=0), (
      probabilities + jnp.sum(probability, axis=0)
    )

  start = tuple(
    jnp.zeros(shape.experts, dtype) for dtype in (jnp.int32, jnp.float32)
  )
  counts, probabilities = _groups(shape, one, start)
  _store_sums(shape, program, counts_ref, counts)
  _store_sums(shape, program, probability_ref, probabilities)


def _choose(group: _Group, ranks, logits):
  """Experts and their logits, [T A], and who is chosen, [T E]."""
  shape = group.shape
  keys = total_order.key(ranks)
  tokens = (shape.tokens, shape.slots)

  def one(j, carry):
    experts, chosen, taken = carry
    left = jnp.where(taken, total_order.NO_KEY, keys)
    best = jnp.max(left, axis=1)
    # A NaN has the key that stands for none: who is taken is asked again.
    is_best = (keys == best[:, None]) & ~taken
    expert = jnp.where(is_best, group.expert, total_order.NO_EXPERT)
    expert = jnp.min(expert, axis=1)
    here = group.expert == expert[:, None]
    if shape.has_bias:
      logit = jnp.sum(jnp.where(here, logits, 0.0), axis=1)
    else:
      logit = total_order.value(best)
    at = group.slot == j
    return (
      jnp.where(at, expert[:, None], experts),
      jnp.where(at, logit[:, None], chosen),
      taken | here,
    )

  start = (
    jnp.zeros(tokens, jnp.int32),
    jnp.zeros(tokens, jnp.float32),
    jnp.broadcast_to(~group.is_expert, keys.shape),
  )
  experts, chosen, taken = _each(shape.rule.top_k, one, start)
  return experts, chosen, taken & group.is_expert


def backward(*refs, shape: Shape) -> None:
  """The gradient of some tokens' logits; reference.py has the formulas."""
  arguments = _Arguments(refs)
  z_grad_ref: Any = arguments.next()  # float [1]
  logits_ref = arguments.next()  # [M E]
  valid_ref = arguments.next(shape.has_valid)  # int8 [M]
  experts_ref = arguments.next()  # int [M A]
  gates_ref = arguments.next()  # float [M A]
  chosen_ref = arguments.next()  # float [M A]
  logsumexp_ref = arguments.next()  # float [M]
  gates_grad_ref = arguments.next()  # float [M A]
  probability_grad_ref = arguments.next()  # float [B E]
  logits_grad_ref = arguments.next()  # [M E]

  # Not within a loop, where the interpreter has none.
  rule, program = shape.rule, (pl.program_id(0), pl.program_id(1))

  def one(number, carry):
    group = _Group(shape, program, number)
    logits = group.of_experts(logits_ref, other=-jnp.inf)
    logsumexp = group.of_tokens(logsumexp_ref)[:, None]
    p = jnp.exp(logits - logsumexp)
    dP = group.of_row(probability_grad_ref, group.row)
    experts = group.of_chosen(experts_ref)
    at_chosen, everywhere = rule.scoring.gate_gradients(
      group.of_chosen(gates_ref),
      group.of_chosen(gates_grad_ref),
      chosen=group.of_chosen(chosen_ref),
      axis=1,
    )
    everywhere += 2 * z_grad_ref[0] * logsumexp
    if rule.order == "sigmoid":
      scores = rule.scoring.scores(logits)
      P = rule.scoring.probability(logits)
      mean = jnp.sum(P * dP, axis=1)[:, None]
      grad = p * everywhere + P * (1 - scores) * (dP - mean)
    else:
      mean = jnp.sum(p * dP, axis=1)[:, None]
      grad = p * (everywhere + dP - mean)

    def add(j, grad):
      here = group.expert == _slot(group, experts, j)[:, None]
      return grad + jnp.where(here, _slot(group, at_chosen, j)[:, None], 0.0)

    grad = _each(rule.top_k, add, grad)
    if valid_ref is not None:
      is_valid = group.of_tokens(valid_ref) != 0
      grad = jnp.where(is_valid[:, None], grad, 0.0)
    group.store_experts(logits_grad_ref, grad)
    return carry

  _groups(shape, one, ())


def _slot(group: _Group, values, j):
  """values[:, j]: registers have no numbers, so a sum over one."""
  zero = jnp.zeros((), values.dtype)
  return jnp.sum(
    jnp.where(group.slot == j, values, zero), axis=1, dtype=values.dtype
  )


def _groups(shape: Shape, body: Callable[[Any, Any], Any], carry):
  """body(group, carry) for every group of a program."""
  if shape.groups == 1:
    return body(0, carry)
  return jax.lax.fori_loop(0, shape.groups, body, carry)


def _each(count: int, body: Callable[[Any, Any], Any], carry):
  """body(j, carry) for j below `count`."""
  if count > _UNROLLED:
    return jax.lax.fori_loop(0, count, body, carry)
  for j in range(count):
    carry = body(j, carry)
  return carry
