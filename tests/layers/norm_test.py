"""RMSNorm against its formula in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.layers.norm import RMSNorm


def _norm(epsilon: float = 1e-5) -> RMSNorm:
  return RMSNorm(
    epsilon=epsilon,
    scale_axis=axes.writes("embed"),
    param_dtype=jnp.dtype("float32"),
  )


def _apply(norm: RMSNorm, scale, x) -> Any:
  return norm.apply({"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x))


def _inputs():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 16)).astype(np.float32)
  return x, rng.normal(size=16).astype(np.float32)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_equals_the_formula(epsilon):
  x, scale = _inputs()
  expected = np.empty_like(x)
  for row in np.ndindex(2, 3):
    mean_square = sum(float(v) ** 2 for v in x[row]) / 16
    expected[row] = x[row] / (mean_square + epsilon) ** 0.5 * scale
  # 16 squares summed, a root and two products: fewer than 20 roundings.
  np.testing.assert_allclose(
    _apply(_norm(epsilon), scale, x), expected, rtol=20 * 2**-24
  )


def test_gradient_equals_the_derivative():
  x, scale = _inputs()
  weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

  def loss(x, scale):
    return jnp.sum(weights * _apply(_norm(), scale, x))

  x_grad, scale_grad = jax.grad(loss, argnums=(0, 1))(x, scale)
  r = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)
  unit, upstream = x / r, weights * scale
  # d/dx of x / r(x): (g - u mean(g u)) / r.
  expected = (
    upstream - unit * np.mean(upstream * unit, axis=-1, keepdims=True)
  ) / r
  np.testing.assert_allclose(x_grad, expected, atol=1e-5)
  np.testing.assert_allclose(
    scale_grad, np.sum(weights * unit, axis=(0, 1)), atol=1e-5
  )


def test_a_mask_weighs_the_mean_and_the_output():
  x, scale = _inputs()
  mask = np.array([1.0] * 10 + [0.25] * 6, np.float32)
  found: Any = _norm().apply(
    {"params": {"scale": jnp.asarray(scale)}}, jnp.asarray(x), jnp.asarray(mask)
  )
  mean = np.sum(mask * x**2, axis=-1, keepdims=True) / 11.5  # 10 + 6 / 4
  expected = mask * x / np.sqrt(mean + 1e-5) * scale
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_half_precision_is_normalised_in_float32():
  x, scale = _inputs()
  half = jnp.asarray(x, jnp.bfloat16)
  out = _apply(_norm(), scale, half)
  assert out.dtype == jnp.bfloat16
  wide = _apply(_norm(), scale, half.astype(jnp.float32))
  # Rounded once, at the end: exactly the float32 result in bfloat16.
  np.testing.assert_array_equal(
    np.asarray(out), np.asarray(wide.astype(jnp.bfloat16))
  )


def test_scale_declares_the_axis_it_is_given():
  for axis in (axes.writes("embed"), axes.reads("embed")):
    norm = RMSNorm(
      epsilon=1e-5, scale_axis=axis, param_dtype=jnp.dtype("bfloat16")
    )
    shapes, declared = axes.split_declared(
      jax.eval_shape(norm.init, jax.random.key(0), jnp.ones((1, 1, 4)))
    )
    assert declared["params"]["scale"].axes == (axis,)
    assert shapes["params"]["scale"].dtype == jnp.bfloat16
