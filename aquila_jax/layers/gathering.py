"""Kernels whose rows other devices store, in shard_map."""

from __future__ import annotations

import functools
import math

import jax
from jax.sharding import PartitionSpec

from aquila_jax.kernels.target import target
from aquila_jax.sharding.rules import GATHERED

# A tile of a TPU's memory has so many rows of 4 bytes; of bfloat16 twice that.
_TILE_ROWS = 8


def gathered_here(kernel: jax.Array, spec: PartitionSpec) -> jax.Array:
  """In shard_map: a part of a kernel, with the rows of the other devices.

  Its gradient is summed over those devices, and each has its rows of it.

  Args:
    kernel: what this device has of a leaf.
    spec: how the leaf is divided.

  Returns:
    What it computes with.
  """
  for i, entry in enumerate(spec):
    entries = entry if isinstance(entry, tuple) else (entry,)
    parts = tuple(
      axis
      for axis in entries
      if axis in GATHERED and jax.lax.axis_size(axis) > 1
    )
    if parts:
      kernel = _gathered(parts, i, kernel)
  return kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(
  axes: tuple[str, ...], dimension: int, kernel: jax.Array
) -> jax.Array:
  return jax.lax.all_gather(kernel, axes, axis=dimension, tiled=True)


def _gathered_forward(axes, dimension, kernel):
  return _gathered(axes, dimension, kernel), None


def _gathered_backward(axes, dimension, _, grad):
  return (scattered(grad, axes, dimension),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def scattered(
  grad: jax.Array, axes: tuple[str, ...], dimension: int
) -> jax.Array:
  """In shard_map: this device's part of a sum over devices.

  The compiler for TPUs (libtpu 0.0.42) gives every device the whole sum, in
  twice the time and in memory of its size, where a device's rows of a stack of
  kernels are no whole tiles, and where the sum is over all devices of the mesh.
  So there neighbours first have the rows that are theirs together, and then
  each its own of those few.

  Args:
    grad: whole along `dimension`.
    axes: of the mesh.
    dimension: to be divided over them.

  Returns:
    The sum's part.
  """
  size = math.prod(map(jax.lax.axis_size, axes))
  scatter = functools.partial(
    jax.lax.psum_scatter, scatter_dimension=dimension, tiled=True
  )
  together = _neighbours(grad, dimension, size)
  if together in (1, size) or size % together or len(axes) != 1:
    return scatter(grad, axes)
  (axis,) = axes
  devices = list(range(size))
  apart = [devices[i::together] for i in range(together)]
  near = [devices[i : i + together] for i in devices[::together]]
  grad = scatter(grad, axis, axis_index_groups=apart)
  return scatter(grad, axis, axis_index_groups=near)


def _neighbours(grad: jax.Array, dimension: int, size: int) -> int:
  """How many devices should have rows together at first; 1: they need not."""
  if target().platform != "tpu":
    return 1
  of_all = 2 if size == jax.sharding.get_abstract_mesh().size else 1
  if grad.ndim < 3 or dimension != grad.ndim - 2:
    return of_all
  tile = _TILE_ROWS * max(1, 4 // grad.dtype.itemsize)
  rows = grad.shape[dimension] // size
  return max(of_all, tile // math.gcd(rows, tile))
