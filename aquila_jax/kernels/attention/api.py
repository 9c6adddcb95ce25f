"""Causal attention over packed rows: the public call and its backends."""

from __future__ import annotations

import functools
from typing import Any

from absl import logging
from jaxtyping import Array, Float, Int

from aquila_jax.core.model_config import AttentionImplementation
from aquila_jax.kernels.attention import (
  chunked,
  cudnn,
  divided,
  reference,
  splash,
)
from aquila_jax.kernels.attention.mesh_axes import UNDIVIDED, MeshAxes, parts
from aquila_jax.kernels.target import target

_NAMES = ("xla", "chunked", "splash", "cudnn")
# Where those run that do not run anywhere.
_PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
# What None chooses where it can.
_KERNELS: dict[str, AttentionImplementation] = {"tpu": "splash"}
# Longer rows are chunked where no kernel takes them.
LONGEST_WHOLE = 512


def causal_attention(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  *,
  segments: Int[Array, "B T"],
  window: int | None = None,
  implementation: AttentionImplementation | None = None,
  mesh_axes: MeshAxes = UNDIVIDED,
) -> Float[Array, "B T K G H"]:
  """softmax(q k^T / sqrt(H)) v over the keys that a query may see.

  Query t sees key s iff s <= t, both have the same number in `segments`, and
  s > t - window. Softmax is at least in float32. Among backends results differ
  by rounding.

  `None` is, in this order, what can take the call: splash on TPUs, xla for rows
  of up to 512 tokens, chunked. cudnn has not run on a GPU yet, and is by name;
  short rows keep the rounding of xla. Memory at 2,048 and 8,192 tokens is in
  benchmarks/results/attention_memory.json.

  Args:
    query: K groups of G heads a token.
    key: a head for each group.
    value: the same.
    segments: the document number of every token; 0 is padding, which sees the
      padding before it.
    window: how many slots back a query sees, its own among them; None is all.
    implementation: None chooses, and logs once what and why.
    mesh_axes: where rows, heads and tokens lie on the context's mesh. Of
      tokens that are divided, keys and values are gathered (divided.py).

  Returns:
    What every query head attends to.

  Raises:
    NotImplementedError: where `implementation` cannot do it, with the reason.
  """
  if implementation is None:
    implementation = _choose(query, mesh_axes=mesh_axes)
  else:
    _check(implementation, query, mesh_axes=mesh_axes)
  masked: dict[str, Any] = dict(segments=segments, window=window)
  if implementation == "splash":
    return splash.causal_attention(
      query, key, value, mesh_axes=mesh_axes, **masked
    )
  if parts(mesh_axes.tokens) > 1:
    module = {"xla": reference, "chunked": chunked}[implementation]
    return divided.causal_attention(
      query,
      key,
      value,
      mesh_axes=mesh_axes,
      attend_from=module.attend_from,
      **masked,
    )
  backend = {"xla": reference, "chunked": chunked, "cudnn": cudnn}
  return backend[implementation].causal_attention(query, key, value, **masked)


def _choose(
  query: Float[Array, "B T K G H"], *, mesh_axes: MeshAxes
) -> AttentionImplementation:
  """The kernel of the platform if it can, else by length; says so once."""
  platform, reason = target().platform, ""
  chosen = "xla" if query.shape[1] <= LONGEST_WHOLE else "chunked"
  if platform in _KERNELS:
    try:
      _check(_KERNELS[platform], query, mesh_axes=mesh_axes)
      chosen = _KERNELS[platform]
    except NotImplementedError as error:
      reason = str(error)
  _say(chosen, platform, reason)
  return chosen


@functools.cache
def _say(name: str, platform: str, reason: str) -> None:
  because = f", as {reason}" if reason else ""
  logging.info("attention: %s on %s%s", name, platform, because)


def _check(
  name: str, query: Float[Array, "B T K G H"], *, mesh_axes: MeshAxes
) -> None:
  if name not in _NAMES:
    raise NotImplementedError(
      f"implementation={name!r}; there are {', '.join(_NAMES)}"
    )
  needed, platform = _PLATFORMS.get(name), target().platform
  if needed not in (None, platform):
    raise NotImplementedError(
      f"implementation={name!r} needs a {needed.upper()}; this is {platform}"
    )
  if name == "splash":
    splash.check(query, mesh_axes=mesh_axes)
  elif name == "cudnn":
    if parts(mesh_axes.tokens) > 1:
      raise NotImplementedError(
        "cudnn needs all tokens of a row on one device; mesh.sequence is"
        f" {parts(mesh_axes.tokens)}"
      )
    cudnn.check(query)
