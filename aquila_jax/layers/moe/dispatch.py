"""Tokens to blocks of rows of one expert, and back: dropless or capacity.

Both variants answer with a `Dispatch`; nothing after it knows which one it
was. Rows move by gathers in both directions, also in the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.types import Leaf
from aquila_jax.layers.moe.router import Routing


class Dispatch(struct.PyTreeNode):
  """Where every routed row goes. R = M * A assignments, P * Q slots."""

  slot: Leaf  # int [R]; of an assignment; P * Q where it was dropped
  assignment: Leaf  # int [slots]; in a slot; R where the slot is empty
  block_expert: Leaf  # int [P]
  num_blocks: Leaf  # int []; blocks in use; they come first
  kept: Leaf  # bool [M A]


@runtime_checkable
class Dispatcher(Protocol):
  """A way to place the rows of a batch into blocks of one expert each."""

  def dispatch(self, routing: Routing) -> Dispatch:
    """Places every assignment of a valid token, or drops it."""
    ...


@dataclasses.dataclass(frozen=True)
class Dropless:
  """Every assignment gets a slot; groups are padded to whole blocks."""

  block_size: int

  def dispatch(self, routing: Routing) -> Dispatch:
    num_experts = routing.logits.shape[-1]
    num_rows = routing.experts.size
    size = self.block_size
    # sum_e ceil(c_e / Q) <= (R + E (Q - 1)) / Q
    max_blocks = (num_rows + num_experts * (size - 1)) // size
    position, counts = _positions(routing)
    blocks = -(-counts // size)
    last_block = jnp.cumsum(blocks, dtype=jnp.int32)
    first_slot = (last_block - blocks) * size
    block_expert = jnp.searchsorted(
      last_block, jnp.arange(max_blocks, dtype=jnp.int32), side="right"
    )
    return _place(
      routing,
      slot=first_slot[routing.experts.reshape(-1)] + position,
      fits=jnp.ones(num_rows, bool),
      num_slots=max_blocks * size,
      block_expert=jnp.minimum(block_expert, num_experts - 1),
      num_blocks=last_block[-1],
    )


@dataclasses.dataclass(frozen=True)
class Capacity:
  """Each expert has ceil(factor * R / E) slots; later assignments are dropped.

  Assignments claim slots in the order of the tokens, a token's first choice
  before its second.
  """

  factor: float

  def dispatch(self, routing: Routing) -> Dispatch:
    num_experts = routing.logits.shape[-1]
    num_rows = routing.experts.size
    capacity = max(1, math.ceil(self.factor * num_rows / num_experts))
    position, _ = _positions(routing)
    return _place(
      routing,
      slot=routing.experts.reshape(-1) * capacity + position,
      fits=position < capacity,
      num_slots=num_experts * capacity,
      block_expert=jnp.arange(num_experts, dtype=jnp.int32),
      num_blocks=jnp.asarray(num_experts, jnp.int32),
    )


def make_dispatcher(config: MoeConfig) -> Dispatcher:
  """The dispatcher that `config` asks for."""
  if config.capacity_factor is None:
    return Dropless(config.block_size)
  return Capacity(config.capacity_factor)


def _positions(
  routing: Routing,
) -> tuple[Int[Array, "R"], Int[Array, "E"]]:
  """Each assignment's place in its expert's group, and the groups' sizes."""
  num_experts = routing.logits.shape[-1]
  experts = routing.experts.reshape(-1)  # (M, A) -> (R,)
  valid = jnp.repeat(routing.valid, routing.experts.shape[-1])
  every = jnp.arange(num_experts, dtype=experts.dtype)
  member = (experts[:, None] == every[None]) & valid[:, None]
  before = jnp.cumsum(member.astype(jnp.int32), axis=0, dtype=jnp.int32)
  position = jnp.take_along_axis(before, experts[:, None], axis=1)[:, 0] - 1
  return position, before[-1]


def _place(
  routing: Routing,
  *,
  slot: Int[Array, "R"],
  fits: Bool[Array, "R"],
  num_slots: int,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
) -> Dispatch:
  num_tokens, top_k = routing.experts.shape
  kept = fits & jnp.repeat(routing.valid, top_k)
  slot = jnp.where(kept, slot, num_slots)
  assignment = jnp.full(num_slots, slot.size, jnp.int32)
  assignment = assignment.at[slot].set(
    jnp.arange(slot.size, dtype=jnp.int32), mode="drop"
  )
  return Dispatch(
    slot=slot,
    assignment=assignment,
    block_expert=block_expert,
    num_blocks=num_blocks,
    kept=kept.reshape(num_tokens, top_k),
  )


def gather_rows(
  x: Float[Array, "M D"], dispatch: Dispatch
) -> Float[Array, "P Q D"]:
  """The rows of all slots, in blocks; an empty slot holds zeros."""
  num_blocks = dispatch.block_expert.shape[0]
  top_k = dispatch.kept.shape[1]
  routed = jnp.repeat(x, top_k, axis=0)  # (M, D) -> (R, D)
  rows = _permute(routed, dispatch.assignment, dispatch.slot)
  return rows.reshape(num_blocks, -1, x.shape[-1])


def combine_rows(
  rows: Float[Array, "P Q D"],
  dispatch: Dispatch,
  *,
  gates: Float[Array, "M A"],
) -> Float[Array, "M D"]:
  """sum_a gate * row of each token's slots; a dropped assignment adds zero."""
  flat = rows.reshape(-1, rows.shape[-1])
  routed = _permute(flat, dispatch.slot, dispatch.assignment)
  routed = routed.reshape(*gates.shape, -1)  # (R, D) -> (M, A, D)
  return jnp.einsum("MAD,MA->MD", routed, gates.astype(routed.dtype))


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _permute(x, index, inverse):
  """x[index], zeros where out of range; `inverse` serves the backward pass.

  Each row is taken at most once, so the transpose of the gather is the gather
  by the inverse index, never a scatter.
  """
  del inverse
  return _take(x, index)


def _permute_forward(x, index, inverse):
  return _take(x, index), inverse


def _permute_backward(inverse, grad):
  return _take(grad, inverse), None, None


_permute.defvjp(_permute_forward, _permute_backward)
