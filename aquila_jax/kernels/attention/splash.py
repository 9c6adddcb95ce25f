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
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from aquila_jax.core import token_order
from aquila_jax.kernels.attention.mesh_axes import UNDIVIDED, MeshAxes, parts

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
  multiple = _LANES * _chunks_of(parts(mesh_axes.tokens))
  if length % multiple:
    raise NotImplementedError(
      f"splash needs T to be a multiple of {multiple}; T={length}"
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
    if size % parts(axes):
      raise NotImplementedError(
        f"splash needs {what} to be a multiple of its parts on the mesh;"
        f" {what}={size}, parts={parts(axes)}"
      )


def _chunks_of(num_parts: int) -> int:
  """Pieces of consecutive tokens that a row on so many devices is cut into."""
  return 2 * num_parts if num_parts > 1 else 1


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
    mesh_axes: where rows, heads and tokens lie on the context's mesh.
    interpret: runs the kernels' bodies without a TPU; for tests.

  Returns:
    What every query head attends to.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = mesh_axes.of(mesh)
  kernel = _kernel(
    query,
    num_parts=parts(axes.tokens),
    window=window,
    interpret=interpret,
  )
  call = functools.partial(_on_device, axes=axes)
  if mesh.size > 1:
    blocks = NamedSharding(mesh, PartitionSpec(None, axes.tokens))
    call = jax.shard_map(
      call,
      mesh=mesh,
      in_specs=(
        kernel.manual_sharding_spec(blocks),
        axes.heads,
        axes.heads,
        axes.heads,
        axes.every_token,
      ),
      out_specs=axes.heads,
      check_vma=False,  # the kernels' outputs have no types on a mesh
    )
  return call(kernel, query, key, value, segments)


@functools.cache
def computed_share(
  length: int,
  *,
  head_dim: int,
  dtype: DTypeLike,
  num_parts: int = 1,
  window: int | None = None,
) -> float:
  """Of the blocks that the kernel goes over, those in which it computes.

  Args:
    length: T, of a row.
    head_dim: H.
    dtype: of the queries.
    num_parts: devices over which a row lies.
    window: as in causal_attention.

  Returns:
    A share; of a long causal row about a half.
  """
  query = jax.ShapeDtypeStruct((1, length, 1, 1, head_dim), dtype)
  kernel = _kernel(query, num_parts=num_parts, window=window, interpret=False)
  blocks = kernel.fwd_mask_info.block_mask
  return 1.0 if blocks is None else float(np.mean(np.asarray(blocks) != 0))


def _kernel(
  query: jax.Array | jax.ShapeDtypeStruct,
  *,
  num_parts: int,
  window: int | None,
  interpret: bool,
) -> Any:
  """Of one row and the queries of one key head; it knows which blocks to skip.

  Where tokens are divided it is of all of them, in the order in which they lie:
  of the blocks that are skipped, every device gets its own part.
  """
  length, _, group_size, head_dim = query.shape[1:]
  num_chunks = _chunks_of(num_parts)
  is_narrow = head_dim * query.dtype.itemsize <= _NARROW
  largest = _BLOCK if is_narrow else _SMALLER_BLOCK
  block_q = math.gcd(length // num_chunks, largest)
  block_kv = math.gcd(length, largest)
  shape = (length, length)
  if window is None:
    mask = splash_attention.CausalMask(shape)
  else:
    mask = splash_attention.LocalMask(shape, (window - 1, 0), 0)
  mask.q_sequence = token_order.token_order(length, max(1, num_chunks // 2))
  return splash_attention.make_splash_mqa(
    splash_attention.MultiHeadMask([mask] * group_size),
    # Fused, the backward pass would hold a gradient of the queries for every
    # block of keys.
    block_sizes=splash_attention.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    head_shards=1,
    q_seq_shards=num_parts,
    interpret=interpret,
  )


def _on_device(kernel, query, key, value, segments, *, axes):
  keys = (key, value, segments)
  if parts(axes.tokens) > 1:
    keys = tuple(token_order.gathered(x, axes.tokens[0]) for x in keys)
  key, value, key_segments = keys

  def of_row(query, key, value, segments, key_segments):
    ids = splash_attention.SegmentIds(q=segments, kv=key_segments)
    attended = jax.vmap(_attended, in_axes=(None, 0, 0, 0, None))
    return attended(kernel, query, key, value, ids)

  # The kernel does not scale. (B, T, K, G, H) -> (B, K, G, T, H)
  scaled = (query * query.shape[-1] ** -0.5).transpose(0, 2, 3, 1, 4)
  key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
  heads = jax.vmap(of_row)(scaled, key, value, segments, key_segments)
  return heads.transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _attended(kernel, query, key, value, ids):
  """The kernel, whose gradient keeps no more than it reads.

  The kernel writes the logarithm of a query's sum into 128 lanes, of which the
  gradient reads one. Left to XLA they are cut where they are read: until then
  all lie in memory, in AquilaMoE's layer twice what the attention itself does,
  and are copied transposed. The barrier cuts them where they were written.
  """
  return kernel(query, key, value, ids)


def _attended_forward(kernel, query, key, value, ids):
  heads, pullback = jax.vjp(
    lambda query, key, value: kernel(query, key, value, ids), query, key, value
  )
  return jax.lax.optimization_barrier((heads, pullback))


def _attended_backward(pullback, upstream):
  return None, *pullback(upstream), None


_attended.defvjp(_attended_forward, _attended_backward)
