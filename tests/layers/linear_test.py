"""Rows times a kernel, whatever the axes of the rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.layers.linear import project


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)])
def test_output_and_gradients_equal_loops(rows):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(*rows, 4)), rng.normal(size=(4, 5))
  upstream = rng.normal(size=(*rows, 5))

  def loss(x, kernel):
    out = project(x, kernel)
    assert out.shape == (*rows, 5)
    return jnp.sum(jnp.asarray(upstream, jnp.float32) * out)

  value, (x_grad, kernel_grad) = jax.jit(jax.value_and_grad(loss, (0, 1)))(
    jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  )
  expected, expected_x, expected_kernel = 0.0, np.zeros_like(x), 0 * kernel
  for row in np.ndindex(*rows):
    expected += upstream[row] @ (x[row] @ kernel)
    expected_x[row] = kernel @ upstream[row]
    expected_kernel += np.outer(x[row], upstream[row])
  # Sums of up to 6 * 20 products of size 1: 120 * 2^-24 = 7e-6.
  np.testing.assert_allclose(value, expected, atol=1e-5)
  np.testing.assert_allclose(x_grad, expected_x, atol=1e-5)
  np.testing.assert_allclose(kernel_grad, expected_kernel, atol=1e-5)


def test_half_precision_stays_or_is_summed_in_the_dtype_asked_for():
  x, kernel = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
  assert project(x, kernel).dtype == jnp.bfloat16
  wide = project(x, kernel, out_dtype=jnp.float32)
  assert wide.dtype == jnp.float32
  np.testing.assert_array_equal(wide, 4)


def test_the_kernels_gradient_is_summed_over_one_axis():
  """Over two XLA:CPU would copy the output's gradient transposed before."""
  x, kernel = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
  jaxpr = jax.make_jaxpr(jax.grad(lambda k: jnp.sum(project(x, k))))(kernel)
  products = [
    equation.params["dimension_numbers"][0]
    for equation in jaxpr.eqns
    if equation.primitive.name == "dot_general"
  ]
  assert len(products) >= 1
  assert all(len(axes) == 1 for pair in products for axes in pair)
