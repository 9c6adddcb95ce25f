"""Experts that lie on several devices: how the rows of tokens reach them.

In shard_map, over the axis of the mesh that experts are divided over. A device
has M tokens, and X of the E experts. An exchange brings a device the rows
of its experts, from wherever their tokens lie, and their outputs back:

  ragged_all_to_all  every row once, to the device of its expert: the least
                     bytes. XLA has it for TPUs and GPUs.
  all_to_all         the same, in chunks of one size for any two devices.
  all_gather         all tokens to all devices, and the sum of what experts
                     make of them by a reduce-scatter: where the devices are no
                     more than the experts of a token.

Buffers have fixed sizes: `buffer_factor` times what a device gets where experts
are met evenly. Where any device would get more, all devices take the exact way
in its place: tokens go around the devices once, with the sum of what experts
have made of them, and no buffer can be too small (`_around`). How many rows go
where is known on all devices before a row moves.

Nothing is dropped here; what a capacity has dropped is not sent.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from absl import logging
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import errors
from aquila_jax.core.model_config import ExpertExchange, MoeConfig
from aquila_jax.core.types import Leaf
from aquila_jax.kernels.expert_ffn import api as expert_ffn
from aquila_jax.kernels.target import target
from aquila_jax.layers.moe import dispatch
from aquila_jax.layers.moe.dispatch import Blocks, Rows, TokenDispatch

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down
# The scope of what is computed where buffers do not suffice.
OVERFLOW = "expert_overflow"


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


class _Gathered(struct.PyTreeNode):
  """The tokens of all devices, and what this one's experts make of them."""

  plan: TokenDispatch  # of all tokens, for this device's experts
  block_expert: Leaf
  num_blocks: Leaf
  axis: str = struct.field(pytree_node=False)

  def gather(self, x: Float[Array, "M D"]) -> Float[Array, "P Q D"]:
    return self.plan.gather(jax.lax.all_gather(x, self.axis, tiled=True))

  def combine(self, rows: Float[Array, "P Q D"]) -> Float[Array, "M D"]:
    out = self.plan.combine(rows)
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
    travelling = _Travelling.of(plan)
    before = traffic.before[me][plan.routing.experts]
    travelling = travelling.replace(positions=travelling.positions + before)
    everyone = jax.tree.map(
      lambda leaf: jax.lax.all_gather(leaf, group.axis, tiled=True), travelling
    )
    here = everyone.placed(
      group.mine(traffic.totals[None])[0], num_rows=group.room, group=group
    )
    return _Gathered(
      plan=here,
      block_expert=here.block_expert,
      num_blocks=here.num_blocks,
      axis=group.axis,
    )

  def sent(self, group: Group) -> float:
    return 2.0 * (group.size - 1) * group.num_tokens


class _Travelling(struct.PyTreeNode):
  """What tokens take along to the experts of other devices."""

  experts: Leaf  # int [M A]; of all E, -1 where an assignment is dropped
  positions: Leaf  # int [M A]
  gates: Leaf  # float [M A]

  @classmethod
  def of(cls, plan: TokenDispatch) -> _Travelling:
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


_EXCHANGES: dict[ExpertExchange, Exchange] = {
  "ragged_all_to_all": RaggedAllToAll(),
  "all_to_all": AllToAll(),
  "all_gather": AllGather(),
}
# Tokens, gates and kernels: what a way has gradients of.
_Floats = tuple[jax.Array, jax.Array, Kernels]
_Way = Callable[[_Floats, TokenDispatch, Traffic], jax.Array]


def apply(
  x: Float[Array, "M D"],
  plan: TokenDispatch,
  kernels: Kernels,
  *,
  config: MoeConfig,
  axis: str,
) -> Float[Array, "M D"]:
  """The sum over a token's experts of gate * expert(x), in shard_map.

  Args:
    x: this device's tokens.
    plan: for all experts, as if they were here.
    kernels: of this device's experts: gate and up [X D F], down [X F D].
    config: which exchange, and its buffers.
    axis: of the mesh, that experts are divided over.

  Returns:
    The outputs of this device's tokens.
  """
  group = Group(
    axis=axis,
    size=jax.lax.axis_size(axis),
    num_experts=config.num_experts,
    num_tokens=x.shape[0],
    top_k=config.top_k,
    block_size=config.block_size,
    buffer_factor=config.buffer_factor,
  )
  exchange = _chosen(config, group, bytes_per_row=x.shape[1] * x.dtype.itemsize)
  traffic = Traffic.of(plan, group)
  floats = (x, plan.routing.gates, kernels)
  plan = jax.lax.stop_gradient(plan)
  if exchange.always_fits(group):
    return _at_once(exchange, group, floats, plan, traffic)
  everywhere = jax.sharding.get_abstract_mesh().axis_names
  fits = jax.lax.pmin(
    exchange.fits(traffic, group).astype(jnp.int32), everywhere
  )
  return _guarded((exchange, group), floats, (fits > 0, plan, traffic))


def _chosen(config: MoeConfig, group: Group, *, bytes_per_row: int) -> Exchange:
  """By name, or by the bytes that a device sends; logged once."""
  platform = target().platform
  best = "ragged_all_to_all" if platform == "tpu" else "all_to_all"
  name: ExpertExchange = config.exchange or min(
    (best, "all_gather"), key=lambda each: _EXCHANGES[each].sent(group)
  )
  if name == "ragged_all_to_all" and platform == "cpu":
    raise errors.UserError(
      f"model.moe.exchange={name!r}: XLA has none for CPUs; expected"
      " 'all_to_all' or 'all_gather'"
    )
  sizes = ", ".join(
    f"{each} {way.sent(group) * bytes_per_row / 1e6:,.3g}"
    for each, way in _EXCHANGES.items()
  )
  _say_once(
    f"experts over {group.axis}={group.size}: {name}; MB that a device sends in"
    f" a layer's forward pass: {sizes}"
  )
  return _EXCHANGES[name]


@functools.cache
def _say_once(message: str) -> None:
  logging.info(message)


def _at_once(
  exchange: Exchange,
  group: Group,
  floats: _Floats,
  plan: TokenDispatch,
  traffic: Traffic,
) -> Float[Array, "M D"]:
  """By the exchange, whose buffers suffice."""
  x, gates, kernels = floats
  plan = plan.replace(routing=plan.routing.replace(gates=gates))
  return computed(x, exchange.rows(plan, traffic, group), kernels)


def computed(
  x: Float[Array, "M D"], rows: Rows, kernels: Kernels
) -> Float[Array, "M D"]:
  """The sum over a token's experts of gate * expert(x), of experts here."""
  out = expert_ffn.expert_ffn(
    rows.gather(x),
    kernels,
    block_expert=rows.block_expert,
    num_blocks=rows.num_blocks,
  )
  return rows.combine(out)


@jax.named_scope(OVERFLOW)
def _around(
  group: Group, floats: _Floats, plan: TokenDispatch, traffic: Traffic
) -> Float[Array, "M D"]:
  """Tokens go around the group once; any choice fits.

  A buffer is for the tokens of one device. Backward, a device's part is
  computed again, so that this does not take N times the memory.
  """
  x, gates, kernels = floats
  plan = plan.replace(routing=plan.routing.replace(gates=gates))
  me = jax.lax.axis_index(group.axis)
  rows = group.mine(traffic.rows)
  onward = [(i, (i + 1) % group.size) for i in range(group.size)]

  @jax.checkpoint
  def visit(guests, step):
    x, travelling, out = guests
    counts = rows[(me - step) % group.size]
    here = travelling.placed(counts, num_rows=group.most_rows, group=group)
    guests = x, travelling, out + computed(x, here, kernels)
    leave = functools.partial(
      jax.lax.ppermute, axis_name=group.axis, perm=onward
    )
    return jax.tree.map(leave, guests), None

  start = x, _Travelling.of(plan), jnp.zeros_like(x)
  (_, _, out), _ = jax.lax.scan(visit, start, jnp.arange(group.size))
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(static, floats, others):
  """By the exchange where it fits, else around.

  Nothing is kept for the backward pass but what comes in: what either way would
  keep, a conditional would keep of both.
  """
  fits, plan, traffic = others
  return jax.lax.cond(fits, *_ways(static), floats, plan, traffic)


def _ways(static: tuple[Exchange, Group]) -> tuple[_Way, _Way]:
  exchange, group = static
  return (
    functools.partial(_at_once, exchange, group),
    functools.partial(_around, group),
  )


def _guarded_forward(static, floats, others):
  return _guarded(static, floats, others), (floats, others)


def _guarded_backward(static, residuals, grad):
  floats, (fits, plan, traffic) = residuals

  def backward(way: _Way):
    def run(floats: _Floats, plan, traffic, grad) -> Any:
      _, pull_back = jax.vjp(lambda some: way(some, plan, traffic), floats)
      return pull_back(grad)[0]

    return run

  grads = jax.lax.cond(
    fits, *map(backward, _ways(static)), floats, plan, traffic, grad
  )
  return grads, None


_guarded.defvjp(_guarded_forward, _guarded_backward)
