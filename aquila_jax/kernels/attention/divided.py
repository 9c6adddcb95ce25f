"""Attention of rows whose tokens lie on several devices.

Each device has the queries of two chunks of every row (core/token_order.py),
and gathers the keys and values of all: with grouped queries those are the small
part. Backward their gradients are summed into the devices that they came from.
The gathered keys are of every layer anew, and nothing is kept of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core import token_order
from aquila_jax.kernels.attention.mesh_axes import MeshAxes, parts

# (query, key, value, segments=, start=, window=): queries at consecutive slots
# from `start`, which may be traced, of the slots that keys are given of.
AttendFrom = Callable[..., jax.Array]


def causal_attention(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segments: Int[Array, "B T"],
  window: int | None = None,
  mesh_axes: MeshAxes,
  attend_from: AttendFrom,
) -> Float[Array, "B T K G H"]:
  """As api.causal_attention, of tokens that are divided.

  Args:
    query: see there.
    key: see there.
    value: see there.
    segments: see there.
    window: see there.
    mesh_axes: of the context's mesh; what does not divide B or K is left out.
    attend_from: of a backend, for the queries of one chunk.

  Returns:
    What every query head attends to, in the order of the queries.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = mesh_axes.of(mesh)
  if query.shape[0] % parts(axes.rows):
    axes = MeshAxes(kv_heads=axes.kv_heads, tokens=axes.tokens)
  if query.shape[2] % parts(axes.kv_heads):
    axes = MeshAxes(rows=axes.rows, tokens=axes.tokens)
  return jax.shard_map(
    functools.partial(
      _on_device,
      window=window,
      axis=axes.tokens[0],
      parts=parts(axes.tokens),
      attend_from=attend_from,
    ),
    mesh=mesh,
    in_specs=(axes.heads, axes.heads, axes.heads, axes.every_token),
    out_specs=axes.heads,
    check_vma=False,
  )(query, key, value, segments)


def _on_device(
  query, key, value, segments, *, window, axis, parts, attend_from
):
  key, value, segments = (
    token_order.gathered(x, axis) for x in (key, value, segments)
  )
  chunk = query.shape[1] // 2
  first = jax.lax.axis_index(axis)
  last = len(token_order.chunks(parts)) - 1
  # The early chunk is one of the first half of the row.
  halves = ((first, key.shape[1] // 2), (last - first, key.shape[1]))
  found = [
    attend_from(
      queries,
      key[:, :seen],
      value[:, :seen],
      segments=segments[:, :seen],
      start=number * chunk,
      window=window,
    )
    for queries, (number, seen) in zip(
      jnp.split(query, 2, axis=1), halves, strict=True
    )
  ]
  return jnp.concatenate(found, axis=1)
