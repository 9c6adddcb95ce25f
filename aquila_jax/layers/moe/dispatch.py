"""Tokens to blocks of rows of one expert, and back: dropless or capacity.

A dispatcher answers with a `Dispatch`, an object that moves rows out and back;
nothing after it knows which one it was. Here tokens have chosen; experts choose
in expert_choice.py. Rows move by gathers in both directions, also in the
backward pass. What the A slots of tokens hold is gathered choice by choice and
added: as one array [M A D] a TPU takes 6 times as long for it, as [A M D] 7.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import dtypes, token_order
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.types import Leaf
from aquila_jax.kernels.topk_routing.reference import chosen_by
from aquila_jax.layers.moe.losses import RoutingSums, squared_logsumexp
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.layers.moe.selection import Routing, route, routing


class Meetings(struct.PyTreeNode):
  """Which tokens and experts were meant to meet, for losses and statistics.

  Tokens are in one axis, [M], and of a whole batch in two, [B T].
  """

  assigned: Leaf  # bool [M E]; chosen, whether or not a slot was found
  ids: Leaf  # int [M A]; the experts of a token, -1 is none
  top_gate: Leaf  # float [M]; a token's largest gate, 0 where it has none
  # float []; valid tokens that the dispatcher could not serve, one of which it
  # could serve a part as that part
  dropped: Leaf


@runtime_checkable
class Rows(Protocol):
  """Where rows go: P blocks of Q slots, each block of one expert."""

  block_expert: Leaf  # int [P]
  num_blocks: Leaf  # int []; blocks in use; they come first

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "P Q D"]:
    """The rows of all slots, in blocks.

    An empty slot holds what is finite where all tokens are. Nothing reads what
    becomes of it, and its gradient is zero.
    """
    ...

  def combine(self, rows: Float[Array, "P Q D"]) -> Float[Array, "M D"]:
    """The sum over a token's slots of gate * row, in the rows' dtype."""
    ...


@runtime_checkable
class Dispatch(Rows, Protocol):
  """Where rows go, and what was meant."""

  def meetings(self) -> Meetings:
    """See `Meetings`."""
    ...


class TokenDispatch(struct.PyTreeNode):
  """Tokens have chosen. R = M * A assignments, P * Q slots."""

  routing: Routing
  slot: Leaf  # int [R]; of an assignment; P * Q where it was dropped
  assignment: Leaf  # int [slots]; in a slot; R where the slot is empty
  block_expert: Leaf  # int [P]
  num_blocks: Leaf  # int []
  kept: Leaf  # bool [M A]
  served: (
    Leaf  # int [E]; of an expert's assignments, the first so many are kept
  )

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "P Q D"]:
    num_blocks = self.block_expert.shape[0]
    rows = _spread(x, self.assignment, self.slot)
    return rows.reshape(num_blocks, -1, x.shape[-1])

  def combine(self, rows: Float[Array, "P Q D"]) -> Float[Array, "M D"]:
    """A dropped assignment adds zero."""
    flat = rows.reshape(-1, rows.shape[-1])
    return _weighted(flat, self.routing.gates, self.slot, self.assignment)

  def meetings(self) -> Meetings:
    """A token has a part for each of its assignments."""
    routing, valid = self.routing, self.routing.valid[:, None]
    lost = jnp.sum(valid & ~self.kept).astype(routing.gates.dtype)
    return Meetings(
      assigned=chosen_by(routing.experts, routing.counts.size) & valid,
      ids=jnp.where(valid, routing.experts, -1),
      top_gate=jnp.max(routing.gates, axis=-1),
      dropped=lost / self.kept.shape[1],
    )


@runtime_checkable
class Placement(Protocol):
  """A way to place what tokens have chosen into blocks of one expert each."""

  def place(self, routing: Routing) -> TokenDispatch:
    """Places every assignment of a valid token, or drops it."""
    ...


@dataclasses.dataclass(frozen=True)
class Dropless:
  """Every assignment gets a slot; groups are padded to whole blocks."""

  block_size: int

  def place(self, routing: Routing) -> TokenDispatch:
    return _place_in_blocks(
      routing, counts=routing.counts, block_size=self.block_size
    )


@dataclasses.dataclass(frozen=True)
class Capacity:
  """Each expert has ceil(factor * R / E) slots; later assignments are dropped.

  Assignments claim slots in the order of the tokens, a token's first choice
  before its second.
  """

  factor: float

  def place(self, routing: Routing) -> TokenDispatch:
    num_experts = routing.counts.size
    capacity = _capacity(self.factor, routing, num_parts=1)
    served = jnp.minimum(routing.counts, capacity)
    return place(
      routing,
      slot=routing.experts * capacity + routing.positions,
      kept=_kept(routing, served),
      served=served,
      num_slots=num_experts * capacity,
      block_expert=jnp.arange(num_experts, dtype=jnp.int32),
      num_blocks=jnp.asarray(num_experts, jnp.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
  """How the tokens of a batch lie on a mesh, in shard_map.

  A device has whole rows of the batch, or of the rows that it shares with the
  others along `tokens` the chunks that core/token_order.py gives it.
  """

  rows: tuple[str, ...]  # axes of the mesh, over which rows are divided
  num_rows: int  # of this device
  tokens: str | None = None  # the axis over which the tokens of a row are

  def earlier(self, chosen: Bool[Array, "M E"]) -> tuple[jax.Array, jax.Array]:
    """Assignments of this device's pieces of the batch, and those before them.

    A piece is of consecutive tokens, and pieces are in the batch's order.

    Args:
      chosen: by this device's tokens.

    Returns:
      Counts int [pieces E] of each piece, and of all that come before it.
    """
    if self.tokens is None:
      mine = jnp.sum(chosen, axis=0, dtype=jnp.int32)[None]
      return mine, self._of_earlier_rows(mine[0])[None]
    # (M, E) -> (B, 2, T / 2N, E)
    pieces = chosen.reshape(self.num_rows, 2, -1, chosen.shape[-1])
    mine = jnp.sum(pieces, axis=2, dtype=jnp.int32)
    every = token_order.gathered(mine, self.tokens)  # (B, 2N, E)
    flat = every.reshape(-1, every.shape[-1])
    before = jnp.cumsum(flat, axis=0, dtype=jnp.int32) - flat
    before += self._of_earlier_rows(flat.sum(0, dtype=jnp.int32))[None]
    before = before.reshape(every.shape)
    me, last = jax.lax.axis_index(self.tokens), every.shape[1] - 1
    own = jnp.take(before, jnp.stack([me, last - me]), axis=1)
    return mine.reshape(-1, mine.shape[-1]), own.reshape(-1, own.shape[-1])

  def _of_earlier_rows(self, counts: Int[Array, "E"]) -> Int[Array, "E"]:
    """Of devices that have rows before this one's."""
    if not self.rows:
      return jnp.zeros_like(counts)
    every = jax.lax.all_gather(counts, self.rows)  # (parts, E)
    parts = jnp.arange(every.shape[0])
    earlier = (parts < jax.lax.axis_index(self.rows))[:, None]
    return jnp.sum(jnp.where(earlier, every, 0), axis=0, dtype=counts.dtype)

  @property
  def axes(self) -> tuple[str, ...]:
    """All that tokens are divided over."""
    return self.rows if self.tokens is None else (*self.rows, self.tokens)


@dataclasses.dataclass(frozen=True)
class DividedCapacity:
  """`Capacity` of a batch whose tokens lie on several devices, in shard_map.

  An expert's slots are the batch's: a device has room for all that its tokens
  choose, and drops what earlier tokens have left no slot for.
  """

  factor: float
  block_size: int
  division: Division

  def place(self, routing: Routing) -> TokenDispatch:
    chosen = chosen_by(routing.experts, routing.counts.size)
    counts, before = self.division.earlier(chosen & routing.valid[:, None])
    num_parts = math.prod(map(jax.lax.axis_size, self.division.axes))
    capacity = _capacity(self.factor, routing, num_parts=num_parts)
    # Of pieces in the batch's order, the first tokens of the first ones.
    served = jnp.clip(capacity - before, 0, counts)
    return _place_in_blocks(
      routing,
      counts=jnp.sum(served, axis=0, dtype=jnp.int32),
      block_size=self.block_size,
    )


def make_placement(
  config: MoeConfig, *, division: Division | None = None
) -> Placement:
  """The placement that `config` asks for.

  Args:
    config: block size, capacity.
    division: of the batch, in shard_map; None where a device has all tokens.

  Returns:
    The placement.
  """
  factor, block_size = config.capacity_factor, config.block_size
  if factor is None:
    return Dropless(block_size)
  if division is not None:
    return DividedCapacity(factor, block_size, division)
  return Capacity(factor)


@dataclasses.dataclass(frozen=True)
class TokenChoice:
  """Every token goes to its own `top_k` experts."""

  config: MoeConfig
  division: Division | None = None  # as in make_placement

  def dispatch(
    self, affinity: Affinity, *, num_rows: int
  ) -> tuple[TokenDispatch, RoutingSums]:
    routed = route(affinity, self.config, num_rows=num_rows)
    is_plain = affinity.plain is affinity.logits
    sums = RoutingSums(
      counts=routed.counts,
      probability=routed.probability,
      entropy=routed.entropy,
      # The routing's is of the logits, normalised and with their noise.
      z=routed.z if is_plain else squared_logsumexp(affinity),
    )
    placement = make_placement(self.config, division=self.division)
    return placement.place(routing(routed, affinity)), sums


def _capacity(factor: float, routing: Routing, *, num_parts: int) -> int:
  """An expert's slots, of a batch of so many times the assignments."""
  num_rows = num_parts * routing.experts.size
  return max(1, math.ceil(factor * num_rows / routing.counts.size))


def _place_in_blocks(
  routing: Routing, *, counts: Int[Array, "E"], block_size: int
) -> TokenDispatch:
  """Each expert's first `counts` assignments, in blocks of one expert."""
  blocks = Blocks.of(
    counts, num_rows=routing.experts.size, block_size=block_size
  )
  return place(
    routing,
    slot=blocks.first_slot[routing.experts] + routing.positions,
    kept=_kept(routing, counts),
    served=counts,
    num_slots=blocks.num_slots,
    block_expert=blocks.expert,
    num_blocks=blocks.count,
  )


class Blocks(struct.PyTreeNode):
  """Groups of rows, one an expert, each padded to whole blocks of Q slots."""

  first_slot: Leaf  # int [E]; of an expert's group
  expert: Leaf  # int [P]; of a block
  count: Leaf  # int []; blocks in use; they come first
  num_slots: int = struct.field(pytree_node=False)  # P * Q

  @classmethod
  def of(
    cls, counts: Int[Array, "E"], *, num_rows: int, block_size: int
  ) -> Blocks:
    """Room for groups of these sizes, which are `num_rows` at most together."""
    num_experts = counts.size
    # sum_e ceil(c_e / Q) <= (R + E (Q - 1)) / Q
    max_blocks = (num_rows + num_experts * (block_size - 1)) // block_size
    blocks = -(-counts // block_size)
    last_block = jnp.cumsum(blocks, dtype=jnp.int32)
    block_expert = jnp.searchsorted(
      last_block,
      jnp.arange(max_blocks, dtype=jnp.int32),
      side="right",
      method="compare_all",  # a search in steps would wait for each of them
    )
    return cls(
      first_slot=(last_block - blocks) * block_size,
      expert=jnp.minimum(block_expert, num_experts - 1),
      count=last_block[-1],
      num_slots=max_blocks * block_size,
    )


def place(
  routing: Routing,
  *,
  slot: Int[Array, "M A"],
  kept: Bool[Array, "M A"],
  served: Int[Array, "E"],
  num_slots: int,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
) -> TokenDispatch:
  """Assignments in slots of their own.

  Args:
    routing: of the tokens.
    slot: of every assignment that is kept.
    kept: whether an assignment is.
    served: of each expert, how many are.
    num_slots: P * Q.
    block_expert: see TokenDispatch.
    num_blocks: see there.

  Returns:
    The plan.
  """
  slot = jnp.where(kept, slot, num_slots).reshape(-1)
  return TokenDispatch(
    routing=routing,
    slot=slot,
    assignment=inverse(slot, num_slots),
    block_expert=block_expert,
    num_blocks=num_blocks,
    kept=kept,
    served=served,
  )


def _kept(routing: Routing, served: Int[Array, "E"]) -> Bool[Array, "M A"]:
  """Of each expert the first so many assignments of valid tokens."""
  return (routing.positions < served[routing.experts]) & routing.valid[:, None]


def inverse(index: Int[Array, "R"], length: int) -> Int[Array, "length"]:
  """Who has `index`: for 0, 1, ... the place in it, R where nobody has it."""
  nobody = jnp.full(length, index.size, jnp.int32)
  everyone = jnp.arange(index.size, dtype=jnp.int32)
  return nobody.at[index].set(everyone, mode="drop")


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[index], of an index out of range zeros."""
  return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def clipped(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[index], of an index out of range the last row."""
  return jnp.take(x, index, axis=0, mode="clip")


def sum_of_slots(
  rows: Float[Array, "slots D"],
  slot: Int[Array, "M A"],
  *,
  weights: Float[Array, "M A"] | None = None,
) -> Float[Array, "M D"]:
  """What tokens have in their slots, times weights, added in float32."""
  wide = dtypes.at_least_float32(rows.dtype)
  total: Any = 0.0
  for choice in range(slot.shape[1]):
    index = slot[:, choice]
    found = clipped(rows, index).astype(wide)
    if weights is not None:
      # In the rows' dtype, as a router's gates are in the reference models.
      weight = weights[:, choice].astype(rows.dtype).astype(wide)
      found *= weight[:, None]
    total += jnp.where((index < rows.shape[0])[:, None], found, 0.0)
  return total.astype(rows.dtype)


@jax.custom_vjp
def _spread(x, assignment, slot):
  """x[assignment // A], (M, D) -> (slots, D); the last row in empty slots.

  A token's row is read for each of its slots and never stood beside itself;
  backward, what its slots have is gathered and summed.
  """
  # An empty slot has R, which is A times M.
  return clipped(x, assignment // (slot.size // x.shape[0]))


def _spread_forward(x, assignment, slot):
  return _spread(x, assignment, slot), slot.reshape(x.shape[0], -1)


def _spread_backward(slot, grad):
  return sum_of_slots(grad, slot), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _weighted(rows, gates, slot, assignment):
  """sum_a gates[m, a] * rows[slot[m, a]]; (slots, D) -> (M, D).

  Backward a token's gradient is read for each of its slots, once for rows and
  gates.
  """
  del assignment
  return sum_of_slots(rows, slot.reshape(gates.shape), weights=gates)


def _weighted_forward(rows, gates, slot, assignment):
  out = _weighted(rows, gates, slot, assignment)
  return out, (rows, gates, slot, assignment)


def _weighted_backward(residuals, grad):
  rows, gates, slot, assignment = residuals
  wide = dtypes.at_least_float32(rows.dtype)
  grad_rows = clipped(grad, assignment // gates.shape[1]).astype(wide)
  gate = clipped(gates.reshape(-1).astype(rows.dtype), assignment)
  is_used = (assignment < slot.size)[:, None]
  rows_grad = jnp.where(is_used, grad_rows * gate.astype(wide)[:, None], 0.0)
  of_slot = jnp.sum(rows.astype(wide) * grad_rows, axis=-1)
  gates_grad = take(of_slot, slot).reshape(gates.shape)
  return (
    rows_grad.astype(rows.dtype),
    gates_grad.astype(gates.dtype),
    None,
    None,
  )


_weighted.defvjp(_weighted_forward, _weighted_backward)


@jax.custom_vjp
def permute(x, index, inverse):
  """x[index], zeros where out of range; `inverse` serves the backward pass.

  Each row is taken at most once, so the transpose of the gather is the gather
  by the inverse index, never a scatter.
  """
  del inverse
  return take(x, index)


def _permute_forward(x, index, inverse):
  return take(x, index), inverse


def _permute_backward(inverse, grad):
  return take(grad, inverse), None, None


permute.defvjp(_permute_forward, _permute_backward)
