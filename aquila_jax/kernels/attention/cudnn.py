"""Causal grouped-query attention by cuDNN, for NVIDIA GPUs.

`jax.nn.dot_product_attention(implementation="cudnn")` is causal and has a
window, and no [T, T] is held. Of documents it knows nothing that fits: a bias
is [B, 1, T, T], with a gradient as large; lengths and offsets of packed
sequences are not in the public call, need the greatest number of documents a
row when compiled, and hold the softmax's statistics once for each.

So documents become features. Each document of a row gets a set of half of d
numbers, no two the same; a query has -c at its document's numbers and a key c
at those that its document has not. Their product is 0, term by term, within a
document, and at most -c^2 between two. d is 16 up to rows of 12,870 tokens: a
head of 64 becomes one of 80.

That this lowers to cuDNN's calls, and that the features mask as they should, is
tested without a GPU; cuDNN itself has not run here.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# c; its square over sqrt(H) is a million for H = 256, so that a hidden key's
# weight is exactly 0 beside any logit above minus that. Exact in float16.
_HIDDEN = 2.0**12
# The widest head, and the one of Hopper (compute capability 9).
_WIDEST, _WIDEST_ON_HOPPER = 128, 256


def check(query: Float[Array, "B T K G H"]) -> None:
  """Whether it can do this, on a GPU.

  Raises:
    NotImplementedError: with the reason, where it cannot.
  """
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"cudnn needs bfloat16 or float16, not {query.dtype}"
    )
  capability = str(jax.local_devices()[0].compute_capability)
  if not re.fullmatch(r"\d+\.\d+", capability):
    raise NotImplementedError(f"cudnn needs an NVIDIA GPU, not {capability}")
  generation = int(capability.partition(".")[0])
  if generation < 8:
    raise NotImplementedError(
      f"cudnn needs compute capability 8.0 or later; this is {capability}"
    )
  widest = _WIDEST_ON_HOPPER if generation == 9 else _WIDEST
  head_dim = query.shape[-1]
  features = num_features(query.shape[1], head_dim=head_dim)
  if head_dim + features > widest:
    raise NotImplementedError(
      f"cudnn needs heads of at most {widest} on compute capability"
      f" {capability}; H={head_dim}, and {features} more tell documents apart"
    )


def causal_attention(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segments: Int[Array, "B T"],
  window: int | None = None,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T K G H"]:
  """As api.causal_attention, of what `check` lets pass.

  Args:
    query: see there.
    key: see there.
    value: see there.
    segments: see there.
    window: see there.
    implementation: "xla" is jax's own of the same call; for tests.

  Returns:
    What every query head attends to.
  """
  *batch, num_kv_heads, group_size, head_dim = query.shape
  num_heads = num_kv_heads * group_size
  member = _members(segments, head_dim=head_dim)[:, :, None]
  of_query = (-_HIDDEN * member).astype(query.dtype)
  of_key = (_HIDDEN * (1 - member)).astype(key.dtype)
  heads = jax.nn.dot_product_attention(
    _with(query.reshape(*batch, num_heads, head_dim), of_query),
    _with(key, of_key),
    _with(value, jnp.zeros_like(of_key)),
    scale=head_dim**-0.5,
    is_causal=True,
    # To the left and to the right, without the query's own.
    local_window_size=None if window is None else (window - 1, 0),
    implementation=implementation,
  )
  return heads[..., :head_dim].reshape(query.shape)


def num_features(length: int, *, head_dim: int) -> int:
  """d: enough sets for `length` documents, and H + d a multiple of 8."""
  features = -head_dim % 8 or 8
  while math.comb(features, features // 2) < length:
    features += 8
  return features


def _members(
  segments: Int[Array, "B T"], *, head_dim: int
) -> Float[Array, "B T d"]:
  """1 at the numbers of each token's document, 0 elsewhere."""
  length = segments.shape[1]
  features = num_features(length, head_dim=head_dim)
  # Numbers below T, equal where the segments are.
  documents = jax.vmap(jnp.searchsorted)(jnp.sort(segments, axis=1), segments)
  return jnp.asarray(_sets(length, features))[documents]


@functools.cache
def _sets(number: int, features: int) -> np.ndarray:
  """The first `number` sets of half of the features, a row each."""
  combinations = itertools.combinations(range(features), features // 2)
  members = np.array(list(itertools.islice(combinations, number)))
  table = np.zeros((number, features), np.float32)
  np.put_along_axis(table, members, 1, axis=1)
  return table


def _with(
  heads: Float[Array, "B T N H"], features: Float[Array, "B T 1 d"]
) -> Float[Array, "B T N W"]:
  shape = (*heads.shape[:-1], features.shape[-1])
  return jnp.concatenate([heads, jnp.broadcast_to(features, shape)], axis=-1)
