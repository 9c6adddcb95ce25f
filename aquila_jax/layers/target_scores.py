"""What the LM head says of targets: all that a loss needs of the logits.

The logits of all tokens are the largest array of most steps. Of a part of the
tokens at a time they need never be there together, forward or backward, where
they are computed again for the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from aquila_jax.core import dtypes
from aquila_jax.core.types import Leaf
from aquila_jax.layers.gathering import gathered_here
from aquila_jax.layers.linear import project
from aquila_jax.sharding.rules import compute_spec, spec_of


class TargetScores(struct.PyTreeNode):
  """Of the logits of every token. At least float32."""

  z: Leaf  # float [B T]; logsumexp(logits)
  target: Leaf  # float [B T]; the target's logit
  largest: Leaf  # float [B T]; max(logits)


def of_logits(
  logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> TargetScores:
  """The scores of logits that are there.

  Args:
    logits: of every token.
    targets: ids below V; another has the logit 0.

  Returns:
    The scores.
  """
  # At least float32: sums over the vocabulary.
  logits = logits.astype(dtypes.at_least_float32(logits.dtype))
  # A masked sum: its gradient is no scatter into [B T V], and it needs no
  # gather across a sharded vocabulary.
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  chosen = ids == targets.astype(jnp.int32)[..., None]
  return TargetScores(
    z=jax.nn.logsumexp(logits, axis=-1),
    target=jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1),
    largest=jnp.max(logits, axis=-1),
  )


def in_chunks(
  x: Float[Array, "B T D"],
  kernel: Float[Array, "D V"],
  targets: Int[Array, "B T"],
  *,
  num_chunks: int,
) -> TargetScores:
  """`of_logits` of x W, where there are logits of a part of a row at a time.

  On a mesh each device does its own tokens, and the kernel is gathered once.

  Args:
    x: of every token.
    kernel: of the head, axes `embed` and `vocab`.
    targets: ids below V.
    num_chunks: parts of a row, or of what a device has of it: the most up to
      this number that divide its tokens evenly.

  Returns:
    The scores.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return _scores(num_chunks, x, kernel, targets)
  kernel_spec = spec_of(("embed", "vocab"), kernel.shape, mesh=mesh)
  tokens = compute_spec(("row", "token"), x.shape[:2], mesh=mesh)
  on_device: Any = functools.partial(
    _on_device, kernel_spec=kernel_spec, num_chunks=num_chunks
  )
  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(tokens, kernel_spec, tokens),
    out_specs=tokens,
    check_vma=False,  # scores are the same along `tensor`, which no type says
  )(x, kernel, targets)


def _divisor(length: int, most: int) -> int:
  return max(n for n in range(1, most + 1) if length % n == 0)


def _on_device(x, kernel, targets, *, kernel_spec, num_chunks):
  kernel = gathered_here(kernel, kernel_spec)
  axis = kernel_spec[1]
  if axis is None:
    return _scores(num_chunks, x, kernel, targets)
  # A part of the vocabulary: a target elsewhere has the logit 0 here.
  first = jax.lax.axis_index(axis) * kernel.shape[1]
  here: Any = _scores(num_chunks, x, kernel, targets - first)
  z, target, largest = (
    jax.lax.all_gather(part, axis)
    for part in (here.z, here.target, here.largest)
  )
  return TargetScores(
    z=jax.nn.logsumexp(z, axis=0),
    target=jnp.sum(target, axis=0),
    largest=jnp.max(largest, axis=0),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(num_chunks, x, kernel, targets):
  return _joined(
    jax.lax.map(
      lambda part: of_logits(_logits(part[0], kernel), part[1]),
      _cut((x, targets), num_chunks),
    )
  )


def _logits(x: Float[Array, "B T D"], kernel: Float[Array, "D V"]) -> jax.Array:
  return project(x, kernel, out_dtype=dtypes.at_least_float32(x.dtype))


def _cut(tree: Any, num_chunks: int) -> Any:
  """So many parts of rows at most, in front: (B, n T, _) -> (n, B, T, _)."""

  def one(leaf):
    parts = _divisor(leaf.shape[1], num_chunks)
    shape = (leaf.shape[0], parts, -1, *leaf.shape[2:])
    return jnp.swapaxes(leaf.reshape(shape), 0, 1)

  return jax.tree.map(one, tree)


def _joined(tree: Any) -> Any:
  """The inverse of `_cut`."""

  def one(leaf):
    leaf = jnp.swapaxes(leaf, 0, 1)
    return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])

  return jax.tree.map(one, tree)


def _scores_forward(num_chunks, x, kernel, targets):
  return _scores(num_chunks, x, kernel, targets), (x, kernel, targets)


def _scores_backward(num_chunks, residuals, grads):
  """The kernel's gradient is summed over chunks in at least float32."""
  x, kernel, targets = residuals
  wide = dtypes.at_least_float32(kernel.dtype)

  def visit(total, part):
    x, targets, grads = part
    _, pull_back = jax.vjp(
      lambda logits: of_logits(logits, targets), _logits(x, kernel)
    )
    (logits_grad,) = pull_back(grads)
    logits_grad = logits_grad.astype(x.dtype)
    x_grad = project(logits_grad, kernel.T)
    rows = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (R, D)
    total += jnp.matmul(
      rows.T,
      logits_grad.reshape(rows.shape[0], -1),
      preferred_element_type=wide,
    )
    return total, x_grad

  total, x_grad = jax.lax.scan(
    visit,
    jnp.zeros(kernel.shape, wide),
    _cut((x, targets, grads), num_chunks),
  )
  return _joined(x_grad), total.astype(kernel.dtype), None


_scores.defvjp(_scores_forward, _scores_backward)
