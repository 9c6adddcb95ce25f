"""Causal grouped-query attention in plain XLA: the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import dtypes


def causal_mask(
  query_segments: Int[Array, "B T"],
  key_segments: Int[Array, "B S"],
  *,
  offset: Int[Array, ""] | int = 0,
  window: int | None = None,
) -> Bool[Array, "B T S"]:
  """Query t may see key s iff s <= t + offset and both are of one document.

  Packed documents so never attend across their borders. Segment 0, padding,
  sees its own padding and nothing else, which keeps its softmax defined.

  Args:
    query_segments: the document number of every query token.
    key_segments: the same of every key token.
    offset: the slot of query token 0 among the keys.
    window: how many slots back a query sees, its own among them; None is all.

  Returns:
    True where attention is allowed.
  """
  num_queries, num_keys = query_segments.shape[1], key_segments.shape[1]
  query_slot = jnp.arange(num_queries)[:, None] + offset
  key_slot = jnp.arange(num_keys)[None, :]
  past = key_slot <= query_slot
  if window is not None:
    past &= key_slot > query_slot - window
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return past[None] & same


def attend(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  mask: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
  """softmax(q k^T / sqrt(H)) v; logits and softmax in float32.

  Heads stay group-major, [K, G], as the kernels have them.
  """
  scale = query.shape[-1] ** -0.5
  dtype = dtypes.at_least_float32(query.dtype)
  logits = jnp.einsum(
    "BTKGH,BSKH->BKGTS", query * scale, key, preferred_element_type=dtype
  )
  logits = jnp.where(mask[:, None, None], logits, jnp.finfo(dtype).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value)


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
  own = jax.lax.dynamic_slice_in_dim(segments, start, query.shape[1], axis=1)
  mask = causal_mask(own, segments, offset=start, window=window)
  return attend(query, key, value, mask=mask)


def causal_attention(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segments: Int[Array, "B T"],
  window: int | None = None,
) -> Float[Array, "B T K G H"]:
  """One softmax over all keys, [B, K, G, T, T] logits at once; see api.py."""
  mask = causal_mask(segments, segments, window=window)
  return attend(query, key, value, mask=mask)
