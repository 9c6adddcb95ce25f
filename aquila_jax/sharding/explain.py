"""Where every parameter lies, as a table for people."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from aquila_jax.core.axes import path_name
from aquila_jax.sharding.rules import COMPUTE, param_shardings

_COLUMNS = ("leaf", "shape", "axes", "lies over", "a device", "bytes a device")


def explain(axes: Any, shapes: Any, *, mesh: Mesh) -> str:
  """A line a leaf: shape, axes, mesh axes, what a device has of it.

  The last line is of what is computed, by the table COMPUTE.

  Args:
    axes: the `LeafAxes` of every parameter.
    shapes: the same tree of anything with shape and dtype.
    mesh: of the devices.

  Returns:
    The table, with the sum of bytes.

  Raises:
    errors.UserError: where a mesh axis does not divide a size of the model.
  """
  shardings = param_shardings(axes, shapes, mesh)
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  rows, total, whole = [], 0, 0
  for (path, leaf), leaf_axes, sharding in zip(
    leaves, jax.tree.leaves(axes), jax.tree.leaves(shardings), strict=True
  ):
    shard = sharding.shard_shape(leaf.shape)
    size = math.prod(shard) * leaf.dtype.itemsize
    total += size
    whole += math.prod(leaf.shape) * leaf.dtype.itemsize
    rows.append(
      (
        path_name(path),
        _sizes(leaf.shape),
        ", ".join(leaf_axes.names),
        _over(leaf_axes.names, sharding),
        _sizes(shard),
        f"{size:,}",
      )
    )
  shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  widths = [
    max(len(row[i]) for row in (_COLUMNS, *rows)) for i in range(len(_COLUMNS))
  ]
  lines = [
    "  ".join(
      cell.rjust(width) if i == len(row) - 1 else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in (_COLUMNS, *rows)
  ]
  return "\n".join(
    [
      f"mesh: {shape}",
      *lines,
      f"{total:,} bytes of parameters a device, of {whole:,}; Adam's moments"
      " and an EMA lie as they do, in float32",
      f"in a step: {_computed(mesh)}",
    ]
  )


def _computed(mesh: Mesh) -> str:
  """As in `row: data and fsdp, mlp: tensor`; of axes with several devices."""
  found = []
  for name, axes in COMPUTE.items():
    kept = [axis for axis in axes if mesh.shape[axis] > 1]
    if kept:
      found.append(f"{name}: {' and '.join(kept)}")
  return ", ".join(found) or "whole everywhere"


def _sizes(shape: tuple[int, ...]) -> str:
  return " x ".join(map(str, shape)) or "scalar"


def _over(names: tuple[str, ...], sharding: NamedSharding) -> str:
  """As in `embed: fsdp, mlp: tensor`; of mesh axes with several devices."""
  sizes = sharding.mesh.shape
  found = []
  for name, entry in zip(names, sharding.spec, strict=False):
    entries = (entry,) if isinstance(entry, str) else entry or ()
    kept = [axis for axis in entries if sizes[axis] > 1]
    if kept:
      found.append(f"{name}: {' and '.join(kept)}")
  return ", ".join(found) or "whole everywhere"
