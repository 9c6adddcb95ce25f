"""Causal grouped-query attention by the splash kernel of jax, for TPUs.

`jax.experimental.pallas.ops.tpu.splash_attention`: a flash kernel that skips
blocks in which the causal mask or the window leaves nothing. It takes document
numbers as they are, [T] a row, and has its own backward kernels. Nothing of
size [T, T] is ever held.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from aquila_jax.kernels.attention.mesh_axes import UNDIVIDED, MeshAxes

# The kernel's lanes: what a block of keys must be a multiple of.
_LANES = 128
# Queries and keys of a block at most, and the bytes of a head up to which so
# many fit: 1024 of 256 in float32 are refused by the compiler for v5p.
_BLOCK, _SMALLER_BLOCK = 1024, 512
_NARROW = 512


def check(query: Float[Array, "B T K G H"], *, mesh_axes: MeshAxes) -> None:
  """Whether it can do this, on TPUs.

  Raises:
    NotImplementedError: with the reason, where it cannot.
  """
  batch_size, length, num_kv_heads = query.shape[:3]
  if length % _LANES:
    raise NotImplementedError(
      f"splash needs T to be a multiple of {_LANES}; T={length}"
    )
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f"splash needs float32 or bfloat16, not {query.dtype}"
    )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and jax.device_count() > 1:
    raise NotImplementedError(
      "splash is divided by shard_map: with several devices it needs a mesh in"
      " the context, by jax.sharding.use_abstract_mesh or jax.set_mesh"
    )
  for what, size, axes in (
    ("B", batch_size, mesh_axes.rows),
    ("K", num_kv_heads, mesh_axes.kv_heads),
  ):
    parts = math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)
    if size % parts:
      raise NotImplementedError(
        f"splash needs {what} to be a multiple of its parts on the mesh;"
        f" {what}={size}, parts={parts}"
      )


def causal_attention(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segments: Int[Array, "B T"],
  window: int | None = None,
  mesh_axes: MeshAxes = UNDIVIDED,
  interpret: bool = False,
) -> Float[Array, "B T K G H"]:
  """As api.causal_attention, of what `check` lets pass.

  Args:
    query: see there.
    key: see there.
    value: see there.
    segments: see there.
    window: see there.
    mesh_axes: the mesh axes of the context's mesh that rows and heads lie on.
    interpret: runs the kernels' bodies without a TPU; for tests.

  Returns:
    What every query head attends to.
  """
  call = functools.partial(_one_device, window=window, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1:
    rows, kv_heads = (
      tuple(axis for axis in axes if axis in mesh.shape)
      for axes in (mesh_axes.rows, mesh_axes.kv_heads)
    )
    spec = PartitionSpec(rows, None, kv_heads)
    call = jax.shard_map(
      call,
      mesh=mesh,
      in_specs=(spec, spec, spec, PartitionSpec(rows)),
      out_specs=spec,
      check_vma=False,  # the kernels' outputs have no types on a mesh
    )
  return call(query, key, value, segments)


def _one_device(query, key, value, segments, *, window, interpret):
  length, _, group_size, head_dim = query.shape[1:]
  is_narrow = head_dim * query.dtype.itemsize <= _NARROW
  block = math.gcd(length, _BLOCK if is_narrow else _SMALLER_BLOCK)
  shape = (length, length)
  if window is None:
    mask = splash_attention.CausalMask(shape)
  else:
    mask = splash_attention.LocalMask(shape, (window - 1, 0), 0)
  kernel: Any = splash_attention.make_splash_mqa_single_device(
    splash_attention.MultiHeadMask([mask] * group_size),
    # Fused, the backward pass would hold a gradient of the queries for every
    # block of keys.
    block_sizes=splash_attention.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=interpret,
  )

  def of_row(query, key, value, segments):
    ids = splash_attention.SegmentIds(q=segments, kv=segments)
    return jax.vmap(kernel, in_axes=(0, 0, 0, None))(query, key, value, ids)

  # The kernel does not scale. (B, T, K, G, H) -> (B, K, G, T, H)
  scaled = (query * head_dim**-0.5).transpose(0, 2, 3, 1, 4)
  key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
  heads = jax.vmap(of_row)(scaled, key, value, segments)
  return heads.transpose(0, 3, 1, 2, 4)
