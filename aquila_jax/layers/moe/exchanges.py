"""How the rows of tokens reach experts on other devices: three exchanges.

In shard_map, over the axis of the mesh that experts are divided over. A device
has M tokens, and X of the E experts. An exchange brings a device the rows of
its experts, from wherever their tokens lie, and their outputs back:

  ragged_all_to_all  every row once, to the device of its expert: the least
                     bytes. XLA has it for TPUs and GPUs.
  all_to_all         the same, in chunks of one size for any two devices.
  all_gather         all tokens to all devices, and the sum of what experts
                     make of them by a reduce-scatter: where the devices are no
                     more than the experts of a token.

Buffers have fixed sizes: `buffer_factor` times what a device gets where experts
are met evenly. How many rows go where is known on all devices before a row
moves, and so whether all fit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core.model_config import ExpertExchange
from aquila_jax.core.types import Leaf
from aquila_jax.layers.moe import dispatch
from aquila_jax.layers.moe.dispatch import Blocks, Rows, TokenDispatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """The N devices that hold all experts together, and what one may get."""

  axis: str  # of the mesh
  size: int  # N
  num_experts: int  # E, of all devices
  num_tokens: int  # M, of a device
  top_k: int  # A
  block_size: int  # Q
  buffer_factor: float

  @property
  def local_experts(self) -> int:
    """X, of a device."""
    return self.num_experts // self.size

  @property
  def most_rows(self) -> int:
    """From a device to a device, whatever its tokens choose."""
    return self.num_tokens * min(self.top_k, self.local_experts)

  @property
  def chunk(self) -> int:
    """Rows that fit from a device to a device."""
    even = self.num_tokens * self.top_k / self.size
    return min(self.most_rows, _padded(self.buffer_factor * even))

  @property
  def room(self) -> int:
    """Rows that fit on a device."""
    even = self.num_tokens * self.top_k
    return min(self.size * self.most_rows, _padded(self.buffer_factor * even))

  def mine(self, columns: Int[Array, "N E"]) -> Int[Array, "N X"]:
    """Those of this device's experts."""
    first = jax.lax.axis_index(self.axis) * self.local_experts
    return jax.lax.dynamic_slice_in_dim(columns, first, self.local_experts, 1)


def _padded(rows: float) -> int:
  """To whole tiles of a TPU's registers, at least one."""
  return 8 * max(1, math.ceil(rows / 8))


class Traffic(struct.PyTreeNode):
  """How many rows go from where to where; the same on all devices."""

  rows: Leaf  # int [N E]; from a device's tokens to an expert

  @classmethod
  def of(cls, plan: TokenDispatch, group: Group) -> Traffic:
    """What the devices of a group have planned."""
    return cls(jax.lax.all_gather(plan.served, group.axis))

  @property
  def before(self) -> Int[Array, "N E"]:
    """An expert's rows from earlier devices."""
    return jnp.cumsum(self.rows, axis=0, dtype=jnp.int32) - self.rows

  @property
  def start(self) -> Int[Array, "N E"]:
    """Where an expert's rows start among all of a device, in their order."""
    return jnp.cumsum(self.rows, axis=1, dtype=jnp.int32) - self.rows

  @property
  def totals(self) -> Int[Array, "E"]:
    """An expert's rows."""
    return jnp.sum(self.rows, axis=0, dtype=jnp.int32)

  def between(self, group: Group) -> Int[Array, "N N"]:
    """From a device to a device."""
    shape = (group.size, group.size, group.local_experts)
    return jnp.sum(self.rows.reshape(shape), axis=-1, dtype=jnp.int32)


@runtime_checkable
class Exchange(Protocol):
  """A way to bring rows to experts."""

  def fits(self, traffic: Traffic, group: Group) -> Bool[Array, ""]:
    """Whether everything fits into the buffers."""
    ...

  def always_fits(self, group: Group) -> bool:
    """Whether it does for any choice."""
    ...

  def rows(self, plan: TokenDispatch, traffic: Traffic, group: Group) -> Rows:
    """The rows of this device's experts, where all fit."""
    ...

  def sent(self, group: Group) -> float:
    """Rows that a device sends to others, there and back."""
    ...


class _Ragged(struct.PyTreeNode):
  """Groups of rows that go straight to their slots elsewhere."""

  plan: TokenDispatch  # in one block, in the order of experts
  block_expert: Leaf
  num_blocks: Leaf
  there: tuple[Leaf, Leaf, Leaf, Leaf]  # as ragged_all_to_all wants them
  back: tuple[Leaf, Leaf, Leaf, Leaf]
  lengths: tuple[int, int] = struct.field(pytree_node=False)  # R, P * Q
  axis: str = struct.field(pytree_node=False)

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "P Q D"]:
    (rows,) = self.plan.gather(x)  # (1, R, D)
    slots: Any = _moved(rows, self.there, self.back, self.lengths, self.axis)
    return slots.reshape(self.block_expert.shape[0], -1, x.shape[-1])

  def combine(self, rows: Float[Array, "P Q D"]) -> Float[Array, "M D"]:
    slots = rows.reshape(-1, rows.shape[-1])
    lengths = self.lengths[::-1]
    returned: Any = _moved(slots, self.back, self.there, lengths, self.axis)
    return self.plan.combine(returned[None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _moved(rows, there, back, lengths, axis):
  """Rows to where `there` says, zeros elsewhere; its transpose is `back`."""
  del back
  out = jnp.zeros((lengths[1], rows.shape[-1]), rows.dtype)
  return jax.lax.ragged_all_to_all(rows, out, *there, axis_name=axis)


def _moved_forward(rows, there, back, lengths, axis):
  return _moved(rows, there, back, lengths, axis), (there, back)


def _moved_backward(lengths, axis, residuals, grad):
  there, back = residuals
  return _moved(grad, back, there, lengths[::-1], axis), None, None


_moved.defvjp(_moved_forward, _moved_backward)


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll:
  """Every row once."""

  def fits(self, traffic: Traffic, group: Group) -> Bool[Array, ""]:
    received = jnp.sum(traffic.between(group), axis=0)
    return jnp.max(received) <= group.room

  def always_fits(self, group: Group) -> bool:
    return group.room == group.size * group.most_rows

  def rows(self, plan: TokenDispatch, traffic: Traffic, group: Group) -> Rows:
    me, mine = jax.lax.axis_index(group.axis), group.mine
    totals = traffic.totals.reshape(group.size, -1)
    blocks: Any = jax.vmap(functools.partial(_blocks, group=group))(totals)
    # On an expert's device, where the rows of each device go.
    slot = blocks.first_slot.reshape(1, -1) + traffic.before
    start, rows = traffic.start, traffic.rows
    sent, received = rows[me], mine(rows).reshape(-1)
    routing = plan.routing
    in_order = dispatch.place(
      routing,
      slot=start[me][routing.experts] + routing.positions,
      kept=plan.kept,
      served=plan.served,
      num_slots=routing.experts.size,
      block_expert=jnp.zeros(1, jnp.int32),
      num_blocks=jnp.ones((), jnp.int32),
    )
    return _Ragged(
      plan=in_order,
      block_expert=blocks.expert[me],
      num_blocks=blocks.count[me],
      there=(start[me], sent, slot[me], received),
      back=(mine(slot).reshape(-1), received, mine(start).reshape(-1), sent),
      lengths=(routing.experts.size, blocks.num_slots),
      axis=group.axis,
    )

  def sent(self, group: Group) -> float:
    even = group.num_tokens * group.top_k / group.size
    return 2.0 * (group.size - 1) * even


def _blocks(totals: Int[Array, "X"], *, group: Group) -> Blocks:
  return Blocks.of(totals, num_rows=group.room, block_size=group.block_size)


class _Chunks(struct.PyTreeNode):
  """Chunks for all devices, and what they send put into blocks."""

  plan: TokenDispatch  # a block for each device
  slot: Leaf  # int [N C]; of a row received, P * Q of an empty one
  row: Leaf  # int [P * Q]; in a slot, N * C where it is empty
  block_expert: Leaf
  num_blocks: Leaf
  axis: str = struct.field(pytree_node=False)

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "P Q D"]:
    chunks = self._swapped(self.plan.gather(x))
    rows = chunks.reshape(-1, x.shape[-1])  # (N, C, D)
    slots = dispatch.permute(rows, self.row, self.slot)
    return slots.reshape(self.block_expert.shape[0], -1, x.shape[-1])

  def combine(self, rows: Float[Array, "P Q D"]) -> Float[Array, "M D"]:
    slots = rows.reshape(-1, rows.shape[-1])
    chunks = dispatch.permute(slots, self.slot, self.row)
    chunks = chunks.reshape(self.plan.block_expert.shape[0], -1, rows.shape[-1])
    return self.plan.combine(self._swapped(chunks))

  def _swapped(self, chunks: Float[Array, "N C D"]) -> Float[Array, "N C D"]:
    return jax.lax.all_to_all(chunks, self.axis, 0, 0, tiled=True)


@dataclasses.dataclass(frozen=True)
class AllToAll:
  """Chunks of one size."""

  def fits(self, traffic: Traffic, group: Group) -> Bool[Array, ""]:
    return jnp.max(traffic.between(group)) <= group.chunk

  def always_fits(self, group: Group) -> bool:
    return group.chunk == group.most_rows

  def rows(self, plan: TokenDispatch, traffic: Traffic, group: Group) -> Rows:
    me, mine, chunk = jax.lax.axis_index(group.axis), group.mine, group.chunk
    routing, start = plan.routing, traffic.start[me]
    of_device = routing.experts // group.local_experts
    within = start - jnp.repeat(
      start[:: group.local_experts], group.local_experts
    )
    every = jnp.arange(group.size, dtype=jnp.int32)
    in_chunks = dispatch.place(
      routing,
      slot=of_device * chunk + within[routing.experts] + routing.positions,
      kept=plan.kept,
      served=plan.served,
      num_slots=group.size * chunk,
      block_expert=every,
      num_blocks=jnp.asarray(group.size, jnp.int32),
    )
    blocks = Blocks.of(
      mine(traffic.totals[None])[0],
      num_rows=group.size * chunk,
      block_size=group.block_size,
    )
    slot = _slots_of_chunks(
      mine(traffic.rows),
      first_slot=blocks.first_slot[None] + mine(traffic.before),
      chunk=chunk,
      empty=blocks.num_slots,
    )
    return _Chunks(
      plan=in_chunks,
      slot=slot,
      row=dispatch.inverse(slot, blocks.num_slots),
      block_expert=blocks.expert,
      num_blocks=blocks.count,
      axis=group.axis,
    )

  def sent(self, group: Group) -> float:
    return 2.0 * (group.size - 1) * group.chunk


def _slots_of_chunks(
  rows: Int[Array, "N X"],
  *,
  first_slot: Int[Array, "N X"],
  chunk: int,
  empty: int,
) -> Int[Array, "R"]:
  """Where the rows of chunks go, each in the order of X experts.

  Args:
    rows: of an expert in a chunk.
    first_slot: where these go, one beside the other.
    chunk: C.
    empty: for what is no row.

  Returns:
    Slots.
  """
  end = jnp.cumsum(rows, axis=1, dtype=jnp.int32)
  place = jnp.arange(chunk, dtype=jnp.int32)[None]
  # (N, 1, X) <= (1, C, 1): of a row, how many experts' rows come before.
  before = end[:, None] <= place[..., None]
  expert = jnp.sum(before, axis=-1, dtype=jnp.int32)
  is_row = expert < rows.shape[1]
  expert = jnp.minimum(expert, rows.shape[1] - 1)
  shift = jnp.take_along_axis(first_slot - end + rows, expert, axis=1)
  return jnp.where(is_row, place + shift, empty).reshape(-1)


class Gathered(struct.PyTreeNode):
  """The tokens of all devices, and what this one's experts make of them."""

  plan: TokenDispatch  # of all tokens, for this device's experts
  block_expert: Leaf
  num_blocks: Leaf
  axis: str = struct.field(pytree_node=False)

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "P Q D"]:
    return self.plan.gather(self.everyone(x))

  def combine(self, rows: Float[Array, "P Q D"]) -> Float[Array, "M D"]:
    return self.mine(self.plan.combine(rows))

  def everyone(self, x: Float[Array, "M D"]) -> Float[Array, "NM D"]:
    """The tokens that `plan` is of."""
    return jax.lax.all_gather(x, self.axis, tiled=True)

  def mine(self, out: Float[Array, "NM D"]) -> Float[Array, "M D"]:
    """Of what all devices have made of these, this one's."""
    return jax.lax.psum_scatter(out, self.axis, tiled=True)


@dataclasses.dataclass(frozen=True)
class AllGather:
  """All tokens to all devices, outputs by a reduce-scatter."""

  def fits(self, traffic: Traffic, group: Group) -> Bool[Array, ""]:
    return RaggedAllToAll().fits(traffic, group)

  def always_fits(self, group: Group) -> bool:
    return RaggedAllToAll().always_fits(group)

  def rows(self, plan: TokenDispatch, traffic: Traffic, group: Group) -> Rows:
    me = jax.lax.axis_index(group.axis)
    travelling = Travelling.of(plan)
    before = traffic.before[me][plan.routing.experts]
    travelling = travelling.replace(positions=travelling.positions + before)
    everyone = jax.tree.map(
      lambda leaf: jax.lax.all_gather(leaf, group.axis, tiled=True), travelling
    )
    here = everyone.placed(
      group.mine(traffic.totals[None])[0], num_rows=group.room, group=group
    )
    return Gathered(
      plan=here,
      block_expert=here.block_expert,
      num_blocks=here.num_blocks,
      axis=group.axis,
    )

  def sent(self, group: Group) -> float:
    return 2.0 * (group.size - 1) * group.num_tokens


class Travelling(struct.PyTreeNode):
  """What tokens take along to the experts of other devices."""

  experts: Leaf  # int [M A]; of all E, -1 where an assignment is dropped
  positions: Leaf  # int [M A]
  gates: Leaf  # float [M A]

  @classmethod
  def of(cls, plan: TokenDispatch) -> Travelling:
    return cls(
      experts=jnp.where(plan.kept, plan.routing.experts, -1),
      positions=plan.routing.positions,
      gates=plan.routing.gates,
    )

  def placed(
    self, totals: Int[Array, "X"], *, num_rows: int, group: Group
  ) -> TokenDispatch:
    """The assignments to this device's experts, `num_rows` at most."""
    first = jax.lax.axis_index(group.axis) * group.local_experts
    experts = self.experts - first
    here = (experts >= 0) & (experts < group.local_experts)
    experts = jnp.where(here, experts, 0)
    blocks = Blocks.of(totals, num_rows=num_rows, block_size=group.block_size)
    return dispatch.place(
      dispatch.Routing(
        experts=experts,
        gates=self.gates,
        valid=jnp.any(here, axis=-1),
        positions=self.positions,
        counts=totals,
      ),
      slot=blocks.first_slot[experts] + self.positions,
      kept=here,
      served=totals,
      num_slots=blocks.num_slots,
      block_expert=blocks.expert,
      num_blocks=blocks.count,
    )


EXCHANGES: dict[ExpertExchange, Exchange] = {
  "ragged_all_to_all": RaggedAllToAll(),
  "all_to_all": AllToAll(),
  "all_gather": AllGather(),
}
