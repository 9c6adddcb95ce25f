"""What every backend of expert_ffn must do; a subclass names the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn import api


def inputs(num_blocks: int = 5):
  """P = 5 blocks of Q = 3 rows, D = 4, F = 6, E = 3; expert 1 gets none."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  kernels = (normal(3, 4, 6), normal(3, 4, 6), normal(3, 6, 4))
  block_expert = jnp.asarray([0, 0, 2, 2, 2], jnp.int32)
  return normal(5, 3, 4), kernels, block_expert, jnp.asarray(num_blocks)


def by_loops(rows, kernels, *, block_expert, num_blocks):
  """One row at a time in float64, zeros in the blocks that are not in use."""
  rows = np.asarray(rows, np.float64)
  gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
  out = np.zeros_like(rows)
  for p in range(int(num_blocks)):
    e = int(block_expert[p])
    for q in range(rows.shape[1]):
      g = rows[p, q] @ gate[e]
      out[p, q] = (g / (1 + np.exp(-g)) * (rows[p, q] @ up[e])) @ down[e]
  return out


def gradients_by_loops(rows, kernels, upstream, *, block_expert, num_blocks):
  """The derivatives of sum(upstream * out), written out for one row."""
  rows = np.asarray(rows, np.float64)
  gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
  rows_grad = np.zeros_like(rows)
  gate_grad, up_grad, down_grad = map(np.zeros_like, (gate, up, down))
  for p in range(int(num_blocks)):
    e = int(block_expert[p])
    for q in range(rows.shape[1]):
      x, y = rows[p, q], np.asarray(upstream[p, q], np.float64)
      g, u = x @ gate[e], x @ up[e]
      s = 1 / (1 + np.exp(-g))
      h_grad = down[e] @ y
      g_grad = h_grad * u * (s + g * s * (1 - s))
      u_grad = h_grad * g * s
      rows_grad[p, q] = gate[e] @ g_grad + up[e] @ u_grad
      gate_grad[e] += np.outer(x, g_grad)
      up_grad[e] += np.outer(x, u_grad)
      down_grad[e] += np.outer(g * s * u, y)
  return rows_grad, (gate_grad, up_grad, down_grad)


# Sums of 6 products, three in a chain, of size up to some tens: about
# 30 * 3 * sqrt(6) * 2^-24 = 1.3e-5.
ATOL = 2e-5


def atol(expected) -> float:
  """The same for numbers of any size: the sum is of 30 at most in ATOL."""
  return ATOL * max(1.0, float(np.max(np.abs(expected))) / 30)


class ExpertFfnContract:
  """Subclasses set `implementation`."""

  implementation: api.Implementation

  def _call(self) -> Callable[..., Any]:
    return jax.jit(
      functools.partial(api.expert_ffn, implementation=self.implementation)
    )

  @pytest.mark.parametrize("num_blocks", [0, 1, 4, 5])
  def test_output_equals_a_loop_over_rows(self, num_blocks):
    rows, kernels, block_expert, used = inputs(num_blocks)
    blocks = dict(block_expert=block_expert, num_blocks=used)
    np.testing.assert_allclose(
      self._call()(rows, kernels, **blocks),
      by_loops(rows, kernels, **blocks),
      atol=ATOL,
    )

  @pytest.mark.parametrize("num_blocks", [0, 1, 4, 5])
  def test_gradients_equal_a_loop_over_rows(self, num_blocks):
    rows, kernels, block_expert, used = inputs(num_blocks)
    blocks = dict(block_expert=block_expert, num_blocks=used)
    upstream = jnp.asarray(
      np.random.default_rng(1).normal(size=rows.shape), jnp.float32
    )
    call = self._call()
    found = jax.grad(
      lambda *a: jnp.sum(upstream * call(*a, **blocks)), argnums=(0, 1)
    )(rows, kernels)
    expected = gradients_by_loops(rows, kernels, upstream, **blocks)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL), found, expected
    )

  def test_what_lies_in_unused_blocks_is_not_read(self):
    rows, kernels, block_expert, used = inputs(3)
    blocks = dict(block_expert=block_expert, num_blocks=used)
    spoilt = rows.at[3:].set(jnp.nan)
    call = self._call()

    def loss(rows, kernels):
      return jnp.sum(call(rows, kernels, **blocks)[:3])

    value, (_, kernel_grads) = jax.value_and_grad(loss, argnums=(0, 1))(
      rows, kernels
    )
    spoilt_value = loss(spoilt, kernels)
    np.testing.assert_array_equal(spoilt_value, value)
    # Expert 1 has no block: it learns nothing.
    for kernel_grad in kernel_grads:
      np.testing.assert_array_equal(kernel_grad[1], 0)

  def test_half_precision_stays(self):
    rows, kernels, block_expert, used = inputs()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (rows, kernels))
    out = self._call()(*half, block_expert=block_expert, num_blocks=used)
    assert out.dtype == jnp.bfloat16
