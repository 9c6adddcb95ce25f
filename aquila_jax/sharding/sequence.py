"""Rows whose tokens lie on several devices: the mesh axis `sequence`.

Outside of the layers tokens are in the order of the row, an N-th of it on each
device; in the layers as core/token_order.py says. Two chunks of every device
move, once a pass.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Shaped

from aquila_jax.core import token_order
from aquila_jax.sharding.mesh import BATCH_AXES, SEQUENCE_AXIS


def token_parts(length: int) -> int:
  """Over how many devices of the context's mesh rows of so many tokens lie.

  Args:
    length: T.

  Returns:
    The size of the axis `sequence`; 1 for rows that it does not divide into
    twice as many chunks, which each of its devices has whole.
  """
  parts = jax.sharding.get_abstract_mesh().shape.get(SEQUENCE_AXIS, 1)
  return parts if token_order.divides(length, parts) else 1


def row_axes(mesh: AbstractMesh, num_rows: int) -> tuple[str, ...]:
  """The axes of a mesh that B rows lie over; none where they do not divide."""
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
  parts = math.prod(mesh.shape[axis] for axis in axes)
  return axes if num_rows % parts == 0 else ()


def dealt(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
  """Tokens as layers have them, from the order of the row."""
  return _on_devices(_dealt, x)


def in_row_order(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
  """The inverse of `dealt`."""
  return _on_devices(_collected, x)


def _on_devices(move, x):
  mesh = jax.sharding.get_abstract_mesh()
  spec = PartitionSpec(row_axes(mesh, x.shape[0]), SEQUENCE_AXIS)
  return jax.shard_map(
    functools.partial(move, parts=mesh.shape[SEQUENCE_AXIS]),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
  )(x)


def _owners(parts: int, first: int) -> list[tuple[int, int]]:
  """Of each device's chunk 2d + first: (d, the device that it belongs to)."""
  owner = {
    chunk: place // 2 for place, chunk in enumerate(token_order.chunks(parts))
  }
  return [(device, owner[2 * device + first]) for device in range(parts)]


def _dealt(x, *, parts):
  """Chunks 2d and 2d + 1 -> chunks d and 2N - 1 - d: one is even, one odd."""
  even, odd = (
    jax.lax.ppermute(half, SEQUENCE_AXIS, _owners(parts, first))
    for first, half in enumerate(jnp.split(x, 2, axis=1))
  )
  return jnp.concatenate(_swapped_on_odd(even, odd), axis=1)


def _collected(x, *, parts):
  halves = _swapped_on_odd(*jnp.split(x, 2, axis=1))
  back = (
    jax.lax.ppermute(
      half, SEQUENCE_AXIS, [(b, a) for a, b in _owners(parts, first)]
    )
    for first, half in enumerate(halves)
  )
  return jnp.concatenate(list(back), axis=1)


def _swapped_on_odd(first, second):
  """Device d's chunk d is the even one where d is even."""
  is_odd = jax.lax.axis_index(SEQUENCE_AXIS) % 2 == 1
  return (
    jnp.where(is_odd, second, first),
    jnp.where(is_odd, first, second),
  )
