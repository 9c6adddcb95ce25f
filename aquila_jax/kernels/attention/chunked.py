"""Causal grouped-query attention in XLA, some queries at a time.

Exact, like the reference: a block of queries sees all its keys in one softmax.
Only the block's logits are held, [B, K, G, block, S], and the backward pass
computes them again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core import dtypes
from aquila_jax.kernels.attention import reference

# Queries at a time.
BLOCK = 128
# Without a window the row is cut into so many runs of blocks, each with a loop
# of its own over no more keys than its last query sees: 9/16 of all products.
_NUM_RUNS = 8


def causal_attention(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segments: Int[Array, "B T"],
  window: int | None = None,
) -> Float[Array, "B T K G H"]:
  """As api.causal_attention, for rows of any length.

  The gradients of keys and values are summed over the blocks in float32.
  """
  dtype = dtypes.at_least_float32(query.dtype)
  # Cast here and back in each block: what is summed over blocks is then wide.
  keys = key.astype(dtype), value.astype(dtype)
  heads = [
    _run(
      query[:, start:stop],
      *(x[:, :stop] for x in keys),
      segments=segments[:, :stop],
      block=block,
      window=window,
    )
    for start, stop, block in _runs(query.shape[1], window=window)
  ]
  return jnp.concatenate(heads, axis=1)


def attend_from(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  segments: Int[Array, "B S"],
  start: Int[Array, ""],
  window: int | None = None,
) -> Float[Array, "B T K G H"]:
  """For divided.py: queries at the slots `start`, `start` + 1, ..."""
  dtype = dtypes.at_least_float32(query.dtype)
  keys = key.astype(dtype), value.astype(dtype)
  length = query.shape[1]
  rest = length % BLOCK
  heads = [
    _run(
      query[:, first:end],
      *keys,
      segments=segments,
      block=block,
      window=window,
      start=start + first,
    )
    for first, end, block in (
      (0, length - rest, BLOCK),
      (length - rest, length, rest),
    )
    if first < end
  ]
  return jnp.concatenate(heads, axis=1)


def _runs(length: int, *, window: int | None) -> Iterator[tuple[int, int, int]]:
  """First query, end and block size of each run; what is left comes last."""
  num_blocks, rest = divmod(length, BLOCK)
  num_runs = min(_NUM_RUNS if window is None else 1, num_blocks)
  for run in range(num_runs):
    first, end = (num_blocks * i // num_runs for i in (run, run + 1))
    yield first * BLOCK, end * BLOCK, BLOCK
  if rest:
    yield length - rest, length, rest


def _run(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  segments: Int[Array, "B S"],
  block: int,
  window: int | None,
  start: Int[Array, ""] | None = None,
) -> Float[Array, "B T K G H"]:
  """The last T of S slots, or T from `start`, `block` queries at a time."""
  num_keys = key.shape[1]
  if start is None:
    start = jnp.asarray(num_keys - query.shape[1])
  # The most keys that the queries of a block see together.
  span = num_keys if window is None else min(num_keys, block + window - 1)

  # Not saved: a scan keeps what its body saves of every step.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend(query_block, slot):
    first = jnp.maximum(slot + block - span, 0)
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=span, axis=1
    )
    mask = reference.causal_mask(
      jax.lax.dynamic_slice_in_dim(segments, slot, block, axis=1),
      cut(segments),
      offset=slot - first,
      window=window,
    )
    seen = (cut(x).astype(query.dtype) for x in (key, value))
    return reference.attend(query_block, *seen, mask=mask)

  def step(_, x):
    return None, attend(*x)

  # (B, T, ...) -> (T / block, B, block, ...)
  blocks = query.reshape(query.shape[0], -1, block, *query.shape[2:])
  blocks = blocks.swapaxes(0, 1)
  slots = start + block * jnp.arange(len(blocks))
  _, heads = jax.lax.scan(step, None, (blocks, slots))
  return heads.swapaxes(0, 1).reshape(query.shape)
