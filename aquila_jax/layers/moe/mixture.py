"""Routed experts of a batch: on one device, or of a batch that lies on many.

Where a mesh divides the rows of a batch, each device routes, moves and computes
its own rows: what belongs to other rows is sums, and how many tokens before its
own have chosen an expert. Kernels that are stored in parts are gathered, layer
by layer, and their gradients summed into those parts; where devices hold
different experts, rows go to them (expert_parallel.py).

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
from aquila_jax.layers.feed_forward import KERNEL_AXES
from aquila_jax.layers.moe import expert_parallel
from aquila_jax.layers.moe.dispatch import Dispatch, Meetings, TokenChoice
from aquila_jax.layers.moe.expert_choice import ExpertChoice
from aquila_jax.layers.moe.losses import RoutingSums
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.sharding.mesh import BATCH_AXES
from aquila_jax.sharding.rules import spec_of

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down
# Names of their axes, in turn.
_KERNEL_AXES = tuple(
  ("expert", *(axis.name for axis in leaf_axes))
  for leaf_axes in KERNEL_AXES.values()
)
# The mesh axis that they are gathered over.
_PARTS = "fsdp"


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
  stored = tuple(
    spec_of(names, kernel.shape, mesh=mesh)
    for names, kernel in zip(_KERNEL_AXES, kernels, strict=True)
  )
  is_plain = affinity.plain is affinity.logits

  def on_device(x, affinity, kernels):
    if is_plain:
      affinity = affinity.replace(plain=affinity.logits)
    plan, sums = TokenChoice(config, divided_over=axes).dispatch(
      affinity, num_rows=num_rows // _parts(mesh, axes)
    )
    kernels = _gathered(kernels, stored)
    if mesh.shape.get("expert", 1) > 1:
      out = expert_parallel.apply(
        x, plan, kernels, config=config, axis="expert"
      )
    else:
      out = expert_parallel.computed(x, plan, kernels)
    meetings = plan.meetings()
    over_rows = functools.partial(jax.lax.psum, axis_name=axes)
    if "tensor" in mesh.shape:
      # Hidden units stay in parts, and so does what they give.
      out = jax.lax.psum(out, "tensor")
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
  out = expert_parallel.computed(x, plan, kernels)
  return out, sums, plan.meetings()


def _parts(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def _gathered(kernels: Kernels, stored: tuple[P, ...]) -> Kernels:
  """This device's experts and hidden units, whole in all else."""

  def one(kernel: jax.Array, spec: P) -> jax.Array:
    for i, entry in enumerate(spec):
      if entry == _PARTS or (isinstance(entry, tuple) and _PARTS in entry):
        kernel = jax.lax.all_gather(kernel, _PARTS, axis=i, tiled=True)
    return kernel

  gate, up, down = map(one, kernels, stored)
  return gate, up, down
