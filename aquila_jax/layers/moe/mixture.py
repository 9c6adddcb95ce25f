"""Routed experts of a batch: on one device, or of a batch that lies on many.

On a mesh each device routes, moves and computes its own tokens: what belongs to
others is sums, and how many tokens before its own have chosen an expert.
Kernels that are stored in parts are gathered, layer by layer, and their
gradients summed into those parts; where devices hold different experts, tokens
go to them (expert_parallel.py). Rows that the mesh does not divide, of a prompt
say, are on all devices, and each does what its experts have to.

Experts that choose tokens choose among all of them, so that the compiler
divides their work.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.layers.feed_forward import KERNEL_AXES
from aquila_jax.layers.gathering import gathered_here
from aquila_jax.layers.moe import expert_parallel
from aquila_jax.layers.moe.dispatch import (
  Dispatch,
  Division,
  Meetings,
  TokenChoice,
  TokenDispatch,
)
from aquila_jax.layers.moe.expert_choice import ExpertChoice
from aquila_jax.layers.moe.losses import RoutingSums
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.sharding.mesh import SEQUENCE_AXIS
from aquila_jax.sharding.rules import spec_of
from aquila_jax.sharding.sequence import row_axes

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down
# Names of their axes, in turn.
_KERNEL_AXES = tuple(
  ("expert", *(axis.name for axis in leaf_axes))
  for leaf_axes in KERNEL_AXES.values()
)


@runtime_checkable
class Choice(Protocol):
  """Who meets whom, and where: tokens choose experts, or experts tokens."""

  def dispatch(
    self, affinity: Affinity, *, num_rows: int
  ) -> tuple[Dispatch, RoutingSums]:
    """The plan for one batch of tokens, and sums over so many rows of it."""
    ...


_CHOICES = {"token": TokenChoice, "expert": ExpertChoice}


def make_choice(config: MoeConfig) -> Choice:
  """The choice that `config` asks for."""
  return _CHOICES[config.choice](config)


def mixture(
  x: Float[Array, "B T D"],
  affinity: Affinity,
  kernels: Kernels,
  *,
  config: MoeConfig,
  token_parts: int = 1,
) -> tuple[Float[Array, "B T D"], RoutingSums, Meetings]:
  """The sum over a token's experts of gate * expert(x).

  Args:
    x: a batch.
    affinity: of the router, for tokens [B T].
    kernels: gate and up [E D F], down [E F D].
    config: how experts are chosen and placed.
    token_parts: devices over which the tokens of a row lie, by
      core/token_order.py.

  Returns:
    The outputs, and who has met whom.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if config.choice == "expert" or mesh.size <= 1:
    return _flattened(x, affinity, kernels, make_choice(config))
  axes = row_axes(mesh, x.shape[0])
  division = Division(
    rows=axes,
    num_rows=x.shape[0] // _parts(mesh, axes),
    tokens=SEQUENCE_AXIS if token_parts > 1 else None,
  )
  rows: Any = P(axes)
  tokens: Any = P(axes, division.tokens)
  everywhere: Any = P()
  stored = tuple(
    spec_of(names, kernel.shape, mesh=mesh)
    for names, kernel in zip(_KERNEL_AXES, kernels, strict=True)
  )
  is_plain = affinity.plain is affinity.logits

  def on_device(x, affinity, kernels):
    if is_plain:
      affinity = affinity.replace(plain=affinity.logits)
    # This device's experts and hidden units, whole in all else.
    gate, up, down = map(gathered_here, kernels, stored)
    return _flattened(
      x,
      affinity,
      (gate, up, down),
      TokenChoice(config, division=division),
      compute=functools.partial(_on_device, config=config, division=division),
    )

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(
      tokens,
      Affinity(
        plain=tokens,
        logits=tokens,
        bias=None if affinity.bias is None else everywhere,
        valid=tokens,
      ),
      stored,
    ),
    out_specs=(
      tokens,
      RoutingSums(
        counts=rows, probability=rows, entropy=everywhere, z=everywhere
      ),
      Meetings(
        assigned=tokens, ids=tokens, top_gate=tokens, dropped=everywhere
      ),
    ),
    check_vma=False,  # kernels' outputs have no types on a mesh
  )(x, affinity, kernels)


_Found = tuple[jax.Array, RoutingSums, Meetings]


def _flattened(
  x: Float[Array, "B T D"],
  affinity: Affinity,
  kernels: Kernels,
  choice: Choice,
  *,
  compute: Callable[..., _Found] | None = None,
) -> tuple[Float[Array, "B T D"], RoutingSums, Meetings]:
  """With tokens in one axis, and back."""
  num_rows, length, _ = x.shape
  flat = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (M, D)
  plan, sums = choice.dispatch(affinity.flat(), num_rows=num_rows)
  if compute is None:
    out, meetings = (
      expert_parallel.computed(flat, plan, kernels),
      plan.meetings(),
    )
  else:
    out, sums, meetings = compute(flat, plan, kernels, sums)

  def in_rows(leaf):  # (M, ...) -> (B, T, ...)
    return leaf.reshape(num_rows, length, *leaf.shape[1:])

  meetings = meetings.replace(
    assigned=in_rows(meetings.assigned),
    ids=in_rows(meetings.ids),
    top_gate=in_rows(meetings.top_gate),
  )
  return out.reshape(x.shape), sums, meetings


def _on_device(
  x: Float[Array, "M D"],
  plan: TokenDispatch,
  kernels: Kernels,
  sums: RoutingSums,
  *,
  config: MoeConfig,
  division: Division,
) -> _Found:
  """What this device's tokens get, and sums over those of all."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("expert", 1) > 1:
    apply = (
      expert_parallel.apply
      if "expert" in division.rows
      else expert_parallel.apply_to_same
    )
    out = apply(x, plan, kernels, config=config, axis="expert")
  else:
    out = expert_parallel.computed(x, plan, kernels)
  if "tensor" in mesh.shape:
    # Hidden units stay in parts, and so does what they give.
    out = jax.lax.psum(out, "tensor")
  meetings = plan.meetings()

  def over_all(leaf):
    return jax.lax.psum(leaf, division.axes) if division.axes else leaf

  sums = sums.replace(entropy=over_all(sums.entropy), z=over_all(sums.z))
  if division.tokens is not None:
    counts, probability = jax.lax.psum(
      (sums.counts, sums.probability), division.tokens
    )
    sums = sums.replace(counts=counts, probability=probability)
  return out, sums, meetings.replace(dropped=over_all(meetings.dropped))


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)
