"""The bodies of the GPU's kernels: a program has some tokens, and all experts.

[T, E] lies in the registers of a program's warps, with T and E rounded up to
powers of two. Experts are chosen one after the other: the largest key that is
left, of the experts that have it the lowest. The positions of a program's
tokens are prefix sums within it; what programs before it have placed is added
behind the kernel (pallas_gpu.py), so that programs need no order.
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
  tokens: int  # a program
  has_bias: bool
  has_valid: bool

  @property
  def experts(self) -> int:
    """E of a program."""
    return power_of_two(self.num_experts)

  @property
  def slots(self) -> int:
    """A of a program."""
    return power_of_two(self.rule.top_k)

  @property
  def programs_per_row(self) -> int:
    """Those that share the tokens of a row."""
    return -(-self.row_tokens // self.tokens)


class _Program:
  """The part of the arrays that a program has, and how it is read and written.

  Rounding up has put more into it than there is: that is neither read nor
  written.
  """

  def __init__(self, shape: Shape):
    self.shape = shape
    self.row, self.number = pl.program_id(0), pl.program_id(1)
    first = self.number * shape.tokens
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

  def store_sums(self, ref, values) -> None:
    """[T E] summed over tokens, to the program's row of [programs E]."""
    row = self.row * self.shape.programs_per_row + self.number
    at = ref.at[pl.ds(row, 1), pl.ds(0, self.shape.experts)]
    total = jnp.sum(values, axis=0)[None]
    plgpu.store(at, total.astype(ref.dtype), mask=self.is_expert)

  @property
  def _mask(self):
    return self.is_token[:, None] & self.is_expert

  @property
  def _chosen_mask(self):
    return self.is_token[:, None] & self.is_slot


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

  program, rule = _Program(shape), shape.rule
  logits = program.of_experts(logits_ref, other=-jnp.inf)
  largest = jnp.max(logits, axis=1)
  # Of -infinity and infinity alike: their difference from themselves is NaN.
  is_finite = jnp.abs(largest) < jnp.inf
  shift = jnp.where(is_finite, largest, 0.0)
  exp = jnp.exp(logits - shift[:, None])
  total = jnp.sum(exp, axis=1)
  logsumexp = jnp.log(total) + shift
  program.store_tokens(logsumexp_ref, logsumexp)
  probability = exp / total[:, None]
  scores = probability
  if rule.order == "sigmoid":
    scores = jax.nn.sigmoid(logits)
    probability = scores / jnp.maximum(
      jnp.sum(scores, axis=1)[:, None], jnp.finfo(jnp.float32).tiny
    )
  ranks = logits
  if bias_ref is not None:
    if rule.order != "topk_then_softmax":
      ranks = scores
    ranks += program.of_row(bias_ref, 0)
  experts, chosen, is_chosen = _choose(program, ranks, logits)
  program.store_chosen(experts_ref, experts)
  program.store_chosen(chosen_ref, chosen)
  gates = rule.scoring.gates(
    jnp.where(program.is_slot, chosen, -jnp.inf), logsumexp[:, None], axis=1
  )

  counted = program.is_token
  if valid_ref is not None:
    counted &= program.of_tokens(valid_ref) != 0
  gates = jnp.where(counted[:, None], gates, 0.0)
  program.store_chosen(gates_ref, gates)
  ones = (is_chosen & counted[:, None]).astype(jnp.int32)
  program.store_sums(counts_ref, ones)
  earlier = jnp.cumsum(ones, axis=0) - ones

  def place(j, positions):
    expert = _slot(program, experts, j)
    here = jnp.where(program.expert == expert[:, None], earlier, 0)
    position = jnp.sum(here, axis=1)
    return jnp.where(program.slot == j, position[:, None], positions)

  positions = _each(rule.top_k, place, jnp.zeros_like(experts))
  positions = jnp.where(counted[:, None], positions, -1)
  program.store_chosen(positions_ref, positions)

  # Not a product: what padding holds may not be finite.
  probability = jnp.where(counted[:, None], probability, 0.0)
  program.store_sums(probability_ref, probability)
  log = jnp.log(jnp.where(probability == 0, 1.0, probability))
  program.store_tokens(entropy_ref, -jnp.sum(probability * log, axis=1))
  square = jnp.where(counted, logsumexp * logsumexp, 0.0)
  program.store_tokens(z_ref, square)


def _choose(program: _Program, ranks, logits):
  """Experts and their logits, [T A], and who is chosen, [T E]."""
  shape = program.shape
  keys = total_order.key(ranks)
  tokens = (shape.tokens, shape.slots)

  def one(j, carry):
    experts, chosen, taken = carry
    left = jnp.where(taken, total_order.NO_KEY, keys)
    best = jnp.max(left, axis=1)
    # A NaN has the key that stands for none: who is taken is asked again.
    is_best = (keys == best[:, None]) & ~taken
    expert = jnp.where(is_best, program.expert, total_order.NO_EXPERT)
    expert = jnp.min(expert, axis=1)
    here = program.expert == expert[:, None]
    if shape.has_bias:
      logit = jnp.sum(jnp.where(here, logits, 0.0), axis=1)
    else:
      logit = total_order.value(best)
    at = program.slot == j
    return (
      jnp.where(at, expert[:, None], experts),
      jnp.where(at, logit[:, None], chosen),
      taken | here,
    )

  start = (
    jnp.zeros(tokens, jnp.int32),
    jnp.zeros(tokens, jnp.float32),
    jnp.broadcast_to(~program.is_expert, keys.shape),
  )
  experts, chosen, taken = _each(shape.rule.top_k, one, start)
  return experts, chosen, taken & program.is_expert


def backward(*refs, shape: Shape) -> None:
  """The gradient of some tokens' logits; reference.py has the formulas."""
  arguments = _Arguments(refs)
  z_grad_ref = arguments.next()  # float [1]
  logits_ref = arguments.next()  # [M E]
  valid_ref = arguments.next(shape.has_valid)  # int8 [M]
  experts_ref = arguments.next()  # int [M A]
  gates_ref = arguments.next()  # float [M A]
  chosen_ref = arguments.next()  # float [M A]
  logsumexp_ref = arguments.next()  # float [M]
  gates_grad_ref = arguments.next()  # float [M A]
  probability_grad_ref = arguments.next()  # float [B E]
  logits_grad_ref = arguments.next()  # [M E]

  program, rule = _Program(shape), shape.rule
  logits = program.of_experts(logits_ref, other=-jnp.inf)
  logsumexp = program.of_tokens(logsumexp_ref)[:, None]
  p = jnp.exp(logits - logsumexp)
  dP = program.of_row(probability_grad_ref, program.row)
  experts = program.of_chosen(experts_ref)
  at_chosen, everywhere = rule.scoring.gate_gradients(
    program.of_chosen(gates_ref),
    program.of_chosen(gates_grad_ref),
    chosen=program.of_chosen(chosen_ref),
    axis=1,
  )
  everywhere += 2 * z_grad_ref[0] * logsumexp
  if rule.order == "sigmoid":
    scores = jax.nn.sigmoid(logits)
    P = scores / jnp.maximum(
      jnp.sum(scores, axis=1)[:, None], jnp.finfo(jnp.float32).tiny
    )
    mean = jnp.sum(P * dP, axis=1)[:, None]
    grad = p * everywhere + P * (1 - scores) * (dP - mean)
  else:
    mean = jnp.sum(p * dP, axis=1)[:, None]
    grad = p * (everywhere + dP - mean)

  def add(j, grad):
    here = program.expert == _slot(program, experts, j)[:, None]
    return grad + jnp.where(here, _slot(program, at_chosen, j)[:, None], 0.0)

  grad = _each(rule.top_k, add, grad)
  if valid_ref is not None:
    is_valid = program.of_tokens(valid_ref) != 0
    grad = jnp.where(is_valid[:, None], grad, 0.0)
  program.store_experts(logits_grad_ref, grad)


def _slot(program: _Program, values, j):
  """values[:, j]: registers have no numbers, so a sum over one."""
  zero = jnp.zeros((), values.dtype)
  return jnp.sum(
    jnp.where(program.slot == j, values, zero), axis=1, dtype=values.dtype
  )


def _each(count: int, body: Callable[[Any, Any], Any], carry):
  """body(j, carry) for j below `count`."""
  if count > _UNROLLED:
    return jax.lax.fori_loop(0, count, body, carry)
  for j in range(count):
    carry = body(j, carry)
  return carry
