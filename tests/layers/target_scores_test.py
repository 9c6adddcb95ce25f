"""Scores of targets: in chunks as at once, on meshes as on one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.layers import target_scores
from aquila_jax.sharding.mesh import make_mesh, on_mesh
from aquila_jax.sharding.rules import spec_of

ROWS, LENGTH, WIDTH, VOCAB = 8, 24, 16, 40


@functools.cache
def _inputs(dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(dtype)
  kernel = (0.5 * rng.normal(size=(WIDTH, VOCAB))).astype(dtype)
  targets = rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32)
  weights = rng.normal(size=(3, ROWS, LENGTH)).astype(np.float32)
  return x, kernel, targets, weights


def _oracle(x, kernel, targets, weights):
  """Scores, and gradients of their weighted sum, by hand in float64."""
  x, kernel, weights = (a.astype(np.float64) for a in (x, kernel, weights))
  logits = x @ kernel
  largest = logits.max(-1)
  sums = np.exp(logits - largest[..., None])
  z = largest + np.log(sums.sum(-1))
  at_target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  eye = np.eye(VOCAB)
  of_logits = (
    weights[0][..., None] * sums / sums.sum(-1, keepdims=True)
    + weights[1][..., None] * eye[targets]
    + weights[2][..., None] * eye[logits.argmax(-1)]
  )
  x_grad = of_logits @ kernel.T
  kernel_grad = np.einsum("btd,btv->dv", x, of_logits)
  return (z, at_target, largest), (x_grad, kernel_grad)


def _weighted(x, kernel, targets, weights, *, num_chunks):
  scores = target_scores.in_chunks(x, kernel, targets, num_chunks=num_chunks)
  parts = scores.z, scores.target, scores.largest
  total = sum(jnp.sum(w * part) for w, part in zip(weights, parts, strict=True))
  return total, parts


def _found(inputs, *, num_chunks, mesh=None):
  x, kernel, targets, weights = inputs
  run = jax.value_and_grad(
    functools.partial(_weighted, num_chunks=num_chunks), (0, 1), has_aux=True
  )
  if mesh is not None:
    spec = spec_of(("embed", "vocab"), kernel.shape, mesh=mesh)
    kernel = jax.device_put(kernel, NamedSharding(mesh, spec))
    run = on_mesh(run, mesh)
  (_, parts), grads = jax.jit(run)(x, kernel, targets, weights)
  return parts, grads


def _assert_close(found, expected, *, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance
    ),
    found,
    expected,
  )


# 7 does not divide a row: 6 does.
@pytest.mark.parametrize("num_chunks", [1, 2, 7, LENGTH])
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 5e-2)]
)
def test_chunks_agree_with_the_logits(num_chunks, dtype, tolerance):
  inputs = _inputs(dtype)
  parts, grads = _found(inputs, num_chunks=num_chunks)
  assert all(part.dtype == jnp.float32 for part in parts)
  assert all(grad.dtype == dtype for grad in grads)
  _assert_close((parts, grads), _oracle(*inputs), tolerance=tolerance)


# The batch's 8 rows are divided by none, all and some of these; a row's 24
# tokens by `sequence`, and the vocabulary of 40 by `tensor`.
@pytest.mark.parametrize(
  "sizes",
  [
    dict(fsdp=8),
    dict(data=2, fsdp=2, tensor=2),
    dict(fsdp=2, sequence=4),
    dict(expert=2, sequence=2, tensor=2),
    dict(tensor=8),
  ],
  ids=str,
)
def test_meshes_agree_with_one_device(sizes):
  inputs = _inputs()
  mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
  found = _found(inputs, num_chunks=3, mesh=mesh)
  _assert_close(found, _oracle(*inputs), tolerance=1e-5)


def test_a_row_that_the_mesh_does_not_divide():
  x, kernel, targets, weights = _inputs()
  inputs = x[:3, :23], kernel, targets[:3, :23], weights[:, :3, :23]
  mesh = make_mesh(MeshConfig(data=1, fsdp=4, sequence=2))
  found = _found(inputs, num_chunks=4, mesh=mesh)
  _assert_close(found, _oracle(*inputs), tolerance=1e-5)


def test_logits_of_all_tokens_are_never_there():
  x, kernel, targets, weights = _inputs()

  def text(num_chunks):
    run = jax.grad(
      lambda *a: _weighted(*a, num_chunks=num_chunks)[0], argnums=(0, 1)
    )
    return jax.jit(run).lower(x, kernel, targets, weights).compile().as_text()

  def sizes(text):
    found = set()
    for line in text.splitlines():
      shape = line.partition(" = f32[")[2].partition("]")[0]
      dims = [int(n) for n in shape.split(",") if n.isdigit()]
      if VOCAB in dims and WIDTH not in dims:
        found.add(int(np.prod(dims)))
    return found

  every = ROWS * LENGTH * VOCAB
  assert max(sizes(text(1))) == every
  assert max(sizes(text(4))) == every // 4
