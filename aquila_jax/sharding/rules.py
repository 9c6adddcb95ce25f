"""Where parameters lie: one table from logical axis to mesh axis.

The declaration of a leaf's axes (core/axes.py) is all that decides. Adam's
moments and the EMA lie where their parameters lie.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes
from aquila_jax.sharding.mesh import nearest_divisors

# Storage: logical axis -> mesh axis. `layer` is scanned and `head_dim` is what
# RoPE pairs up, so neither is cut; `q_per_kv` follows its group.
STORAGE = {
  "layer": None,
  "vocab": "tensor",
  "embed": "fsdp",
  "kv_head": "tensor",
  "q_per_kv": None,
  "head_dim": None,
  "mlp": "tensor",
  "expert": "expert",
  "dense_mlp": "tensor",
  "shared_mlp": "tensor",
  "shared_expert": None,
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


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
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
  axes: LeafAxes, shape: tuple[int, ...], *, mesh: Mesh
) -> PartitionSpec:
  """The PartitionSpec of one leaf, by the table STORAGE.

  Raises:
    errors.UserError: as `param_shardings`.
  """
  entries = []
  for name, size in zip(axes.names, shape, strict=True):
    mesh_axis = STORAGE[name]
    if mesh_axis is not None and size % mesh.shape[mesh_axis]:
      if name in _SIZE_FIELDS:
        raise _indivisible(name, size, mesh_axis=mesh_axis, mesh=mesh)
      mesh_axis = None
    # A square embed -> embed matrix would name its mesh axis twice; a mesh axis
    # cuts a leaf once.
    entries.append(None if mesh_axis in entries else mesh_axis)
  return PartitionSpec(*entries)


def _indivisible(
  name: str, size: int, *, mesh_axis: str, mesh: Mesh
) -> errors.UserError:
  wanted = mesh.shape[mesh_axis]
  fitting = " or ".join(map(str, nearest_divisors(size, wanted)))
  return errors.UserError(
    f"config.mesh.{mesh_axis}={wanted} does not divide {_SIZE_FIELDS[name]}="
    f"{size}; nearest sizes that do: {fitting}"
  )
