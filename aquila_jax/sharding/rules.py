"""Where arrays lie: two tables from logical axis to mesh axes.

STORAGE is of what is held from step to step, and the declaration of a leaf's
axes (core/axes.py) is all that decides: Adam's moments and the EMA lie where
their parameters lie. COMPUTE is of what a step computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes
from aquila_jax.sharding.mesh import (
  BATCH_AXES,
  SEQUENCE_AXIS,
  nearest_divisors,
)

# The mesh axes that parameters are gathered over where they are used. Devices
# that share rows, by `sequence`, need not each hold all of them either.
GATHERED = ("fsdp", "sequence")

# Storage: logical axis -> mesh axes. `layer` is scanned and `head_dim` is what
# RoPE pairs up, so neither is cut; `q_per_kv` follows its group. A mesh axis
# cuts a leaf once, along the first of its dimensions that names it: so what is
# gathered of an FFN are rows, of a kernel that reads `embed` and of one that
# writes it. Columns would come interleaved, to be copied into place.
STORAGE: dict[str, tuple[str, ...]] = {
  "layer": (),
  "vocab": ("tensor",),
  "embed": GATHERED,
  "kv_head": ("tensor",),
  "q_per_kv": (),
  "head_dim": (),
  "mlp": ("tensor", *GATHERED),
  "expert": ("expert",),
  "dense_mlp": ("tensor", *GATHERED),
  "shared_mlp": ("tensor", *GATHERED),
  "shared_expert": (),
}

# Compute: axis of an activation -> mesh axes. Between layers a token is whole.
COMPUTE: dict[str, tuple[str, ...]] = {
  "row": BATCH_AXES,
  "token": (SEQUENCE_AXIS,),
  "vocab": ("tensor",),
  "embed": (),
  "kv_head": ("tensor",),
  "q_per_kv": (),
  "head_dim": (),
  "mlp": ("tensor",),
  "dense_mlp": ("tensor",),
  "shared_mlp": ("tensor",),
}

# Where the user sets the size of an axis that must be divided evenly. `vocab`
# is not among them: the size of a given tokenizer cannot be changed, so a table
# that does not divide stays whole along `vocab`.
_SIZE_FIELDS = {
  "embed": "model.embed_dim",
  "kv_head": "model.num_kv_heads",
  "mlp": "model.mlp_dim",
  "expert": "model.moe.num_experts",
  "dense_mlp": "model.moe.dense_mlp_dim (by default model.mlp_dim)",
  "shared_mlp": "model.moe.shared_expert_dim",
}


def param_shardings(axes: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
  """The sharding of every leaf.

  Args:
    axes: the `LeafAxes` of every leaf.
    shapes: the same tree of anything with a `shape`.
    mesh: of `make_mesh`.

  Returns:
    A tree of NamedSharding.

  Raises:
    errors.UserError: where a mesh axis does not divide a size of the model.
  """
  return jax.tree.map(
    lambda leaf_axes, leaf: NamedSharding(
      mesh, leaf_spec(leaf_axes, tuple(leaf.shape), mesh=mesh)
    ),
    axes,
    shapes,
  )


def laid_out(shapes: Any, shardings: Any) -> Any:
  """A tree of ShapeDtypeStruct with shardings, of shapes and a tree of them."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )


def leaf_spec(
  axes: LeafAxes, shape: tuple[int, ...], *, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
  """The PartitionSpec of one leaf, by the table STORAGE.

  Raises:
    errors.UserError: as `param_shardings`.
  """
  return spec_of(axes.names, shape, mesh=mesh)


def spec_of(
  names: Sequence[str], shape: Sequence[int], *, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
  """As `leaf_spec`, of axes by their names.

  Of an axis with several mesh axes the first must divide it, the others may.
  """
  entries, used = [], set()
  for name, size in zip(names, shape, strict=True):
    taken: list[str] = []
    for mesh_axis in STORAGE[name]:
      if mesh_axis in used or mesh_axis not in mesh.shape:
        continue
      if mesh.shape[mesh_axis] == 1 and mesh_axis != STORAGE[name][0]:
        continue
      rest = size // math.prod(mesh.shape[axis] for axis in taken)
      if rest % mesh.shape[mesh_axis] == 0:
        taken.append(mesh_axis)
      elif mesh_axis == STORAGE[name][0] and name in _SIZE_FIELDS:
        raise _indivisible(name, size, mesh_axis=mesh_axis, mesh=mesh)
    used.update(taken)
    entries.append(tuple(taken) if len(taken) > 1 else next(iter(taken), None))
  return PartitionSpec(*entries)


def constrained(x: jax.Array, *names: str) -> jax.Array:
  """An activation where the table COMPUTE says, on the context's mesh.

  An axis that its mesh axes do not divide together is whole.

  Args:
    x: any array of a step.
    names: of its axes, keys of COMPUTE.

  Returns:
    The same values.
  """
  return _laid(x, lambda mesh: compute_spec(names, x.shape, mesh=mesh))


def compute_spec(
  names: Sequence[str], shape: Sequence[int], *, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
  """Where an activation lies, by the table COMPUTE, as in `constrained`."""
  entries = []
  for name, size in zip(names, shape, strict=True):
    taken = tuple(axis for axis in COMPUTE[name] if axis in mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in taken)
    entries.append(taken if size % parts == 0 else None)
  return PartitionSpec(*entries)


def gathered(kernel: jax.Array, names: Sequence[str]) -> jax.Array:
  """A kernel with the rows that other devices store, on the context's mesh.

  Left to itself the compiler for TPUs gathers the tokens of all devices in
  place of it: for AquilaDense-16B on 256 chips 160 GiB.

  Args:
    kernel: a leaf, in any dtype.
    names: of its axes, keys of STORAGE.

  Returns:
    The same values.
  """
  return _laid(
    kernel,
    lambda mesh: without(spec_of(names, kernel.shape, mesh=mesh), GATHERED),
  )


def _laid(
  x: jax.Array, spec: Callable[[AbstractMesh], PartitionSpec]
) -> jax.Array:
  """As it is where there is one device, and in shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1 or mesh.manual_axes:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh)))


def without(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
  """A spec of what is whole along mesh axes and lies as before on others."""

  def rest(entry):
    names = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(name for name in names if name and name not in axes)
    return kept if len(kept) > 1 else next(iter(kept), None)

  return PartitionSpec(*map(rest, spec))


def _indivisible(
  name: str, size: int, *, mesh_axis: str, mesh: Mesh | AbstractMesh
) -> errors.UserError:
  wanted = mesh.shape[mesh_axis]
  fitting = " or ".join(map(str, nearest_divisors(size, wanted)))
  return errors.UserError(
    f"config.mesh.{mesh_axis}={wanted} does not divide {_SIZE_FIELDS[name]}="
    f"{size}; nearest sizes that do: {fitting}"
  )
