"""Where parameters lie: one table from logical axis to mesh axis.

The declaration of a leaf's axes (core/axes.py) is all that decides. Adam's
moments and the EMA lie where their parameters lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes
from aquila_jax.sharding.mesh import nearest_divisors

# Storage: logical axis -> mesh axes. `layer` is scanned and `head_dim` is what
# RoPE pairs up, so neither is cut; `q_per_kv` follows its group. A mesh axis
# cuts a leaf once, along the first of its dimensions that names it: so what is
# gathered of an FFN over `fsdp` are rows, of a kernel that reads `embed` and of
# one that writes it. Columns would come interleaved, to be copied into place.
STORAGE: dict[str, tuple[str, ...]] = {
  "layer": (),
  "vocab": ("tensor",),
  "embed": ("fsdp",),
  "kv_head": ("tensor",),
  "q_per_kv": (),
  "head_dim": (),
  "mlp": ("tensor", "fsdp"),
  "expert": ("expert",),
  "dense_mlp": ("tensor", "fsdp"),
  "shared_mlp": ("tensor", "fsdp"),
  "shared_expert": (),
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

  Of an axis with two mesh axes the first must divide it, the second may.
  """
  entries, used = [], set()
  for name, size in zip(names, shape, strict=True):
    taken: list[str] = []
    for mesh_axis in STORAGE[name]:
      if mesh_axis in used or mesh_axis not in mesh.shape:
        continue
      rest = size // math.prod(mesh.shape[axis] for axis in taken)
      if rest % mesh.shape[mesh_axis] == 0:
        taken.append(mesh_axis)
      elif mesh_axis == STORAGE[name][0] and name in _SIZE_FIELDS:
        raise _indivisible(name, size, mesh_axis=mesh_axis, mesh=mesh)
    used.update(taken)
    entries.append(tuple(taken) if len(taken) > 1 else next(iter(taken), None))
  return PartitionSpec(*entries)


def without(spec: PartitionSpec, mesh_axis: str) -> PartitionSpec:
  """A spec of what is whole along a mesh axis and lies as before on others."""

  def rest(entry):
    names = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(name for name in names if name not in (None, mesh_axis))
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
