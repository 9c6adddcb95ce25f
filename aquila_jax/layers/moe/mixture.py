"""Routed experts of a batch: on one device, or of a batch that lies on many.

Where a mesh divides the rows of a batch, each device routes, moves and computes
its own rows: what belongs to other rows is sums, and how many tokens before its
own have chosen an expert. Experts come to the tokens: their kernels are
gathered over the axes that store them in parts, layer by layer, and their
gradients summed into those parts.

Experts that choose tokens choose among all of them, so that the compiler
divides their work.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.kernels.expert_ffn import api as expert_ffn
from aquila_jax.layers.moe.dispatch import Dispatch, Meetings, TokenChoice
from aquila_jax.layers.moe.expert_choice import ExpertChoice
from aquila_jax.layers.moe.losses import RoutingSums
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.sharding.mesh import BATCH_AXES
from aquila_jax.sharding.rules import STORAGE

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down


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
  x: Float[Array, "M D"],
  affinity: Affinity,
  kernels: Kernels,
  *,
  config: MoeConfig,
  num_rows: int,
) -> tuple[Float[Array, "M D"], RoutingSums, Meetings]:
  """The sum over a token's experts of gate * expert(x).

  Args:
    x: M tokens, which are `num_rows` rows.
    affinity: of the router.
    kernels: gate and up [E D F], down [E F D].
    config: how experts are chosen and placed.
    num_rows: B.

  Returns:
    The outputs, and who has met whom.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
  # Few rows, of a prompt say, the compiler divides as it can.
  is_divided = mesh.size > 1 and num_rows % _parts(mesh, axes) == 0
  if config.choice == "expert" or not is_divided:
    return _whole(x, affinity, kernels, make_choice(config), num_rows=num_rows)
  rows: Any = P(axes)
  everywhere: Any = P()
  stored = _stored(mesh)
  is_plain = affinity.plain is affinity.logits

  def on_device(x, affinity, kernels):
    if is_plain:
      affinity = affinity.replace(plain=affinity.logits)
    out, sums, meetings = _whole(
      x,
      affinity,
      _gathered(kernels, stored),
      TokenChoice(config, divided_over=axes),
      num_rows=num_rows // _parts(mesh, axes),
    )
    over_rows = functools.partial(jax.lax.psum, axis_name=axes)
    if STORAGE["mlp"] in mesh.shape:
      # Hidden units stay in parts, and so does what they give.
      out = jax.lax.psum(out, STORAGE["mlp"])
    return (
      out,
      sums.replace(entropy=over_rows(sums.entropy), z=over_rows(sums.z)),
      meetings.replace(dropped=over_rows(meetings.dropped)),
    )

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(
      rows,
      Affinity(
        plain=rows,
        logits=rows,
        bias=None if affinity.bias is None else everywhere,
        valid=rows,
      ),
      stored,
    ),
    out_specs=(
      rows,
      RoutingSums(
        counts=rows, probability=rows, entropy=everywhere, z=everywhere
      ),
      Meetings(assigned=rows, ids=rows, top_gate=rows, dropped=everywhere),
    ),
    check_vma=False,  # kernels' outputs have no types on a mesh
  )(x, affinity, kernels)


def _whole(
  x: Float[Array, "M D"],
  affinity: Affinity,
  kernels: Kernels,
  choice: Choice,
  *,
  num_rows: int,
) -> tuple[Float[Array, "M D"], RoutingSums, Meetings]:
  plan, sums = choice.dispatch(affinity, num_rows=num_rows)
  rows = expert_ffn.expert_ffn(
    plan.gather(x),
    kernels,
    block_expert=plan.block_expert,
    num_blocks=plan.num_blocks,
  )
  return plan.combine(rows), sums, plan.meetings()


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def _stored(mesh: AbstractMesh) -> tuple[P, P, P]:
  """How gate, up and down lie."""
  expert, embed, mlp = (
    STORAGE[name] if STORAGE[name] in mesh.shape else None
    for name in ("expert", "embed", "mlp")
  )
  return P(expert, embed, mlp), P(expert, embed, mlp), P(expert, mlp, embed)


def _gathered(kernels: Kernels, stored: tuple[P, P, P]) -> Kernels:
  """All experts, whole along `embed`."""

  def one(kernel: jax.Array, spec: P) -> jax.Array:
    for i, axis in enumerate(spec):
      if axis is not None and axis != STORAGE["mlp"]:
        kernel = jax.lax.all_gather(kernel, axis, axis=i, tiled=True)
    return kernel

  gate, up, down = map(one, kernels, stored)
  return gate, up, down
