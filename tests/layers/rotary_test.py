"""RoPE against rotations of single pairs, and its relative property."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import LinearRopeScaling, Llama3RopeScaling
from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.layers import rotary

_TPU = Target(platform="tpu", device_kind="TPU v6 lite")
_CPU = Target(platform="cpu", device_kind="cpu")


def _rotate(x, positions, *, theta=100.0):
  positions = jnp.asarray(positions, jnp.int32)
  tables = rotary.rotary_tables(positions, head_dim=x.shape[-1], theta=theta)
  return np.asarray(rotary.rotate(jnp.asarray(x), tables))


@pytest.mark.parametrize("heads", [(2,), (2, 3)])
def test_every_pair_is_turned_by_its_angle(heads):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 4, *heads, 6)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3], [5, 0, 1, 40]])
  rotated = _rotate(x, positions)
  for index in np.ndindex(*x.shape[:-1]):
    position = positions[index[:2]]
    for i in range(3):
      angle = float(position) * 100.0 ** (-2 * i / 6)
      a, b = float(x[index][i]), float(x[index][i + 3])
      expected = (
        a * math.cos(angle) - b * math.sin(angle),
        b * math.cos(angle) + a * math.sin(angle),
      )
      # The angle, at most 40, is rounded to float32: 40 * 2^-24 = 2.4e-6.
      np.testing.assert_allclose(
        rotated[index][[i, i + 3]], expected, atol=1e-5
      )


def test_products_depend_on_the_distance_only():
  rng = np.random.default_rng(1)
  query, key = rng.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

  def product(query_position, key_position):
    turned = _rotate(query, [[query_position]])
    return np.sum(turned * _rotate(key, [[key_position]]))

  near = product(5, 2)
  assert abs(near - product(25, 22)) < 1e-5
  assert abs(near - product(6, 2)) > 1e-2


def test_norm_is_kept_and_position_zero_is_left_alone():
  x = np.random.default_rng(2).normal(size=(1, 3, 2, 4)).astype(np.float32)
  rotated = _rotate(x, [[0, 7, 1000]])
  np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
  np.testing.assert_allclose(
    np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
  )


def test_half_precision_is_rotated_in_float32():
  x = np.random.default_rng(3).normal(size=(1, 2, 1, 4))
  half = jnp.asarray(x, jnp.bfloat16)
  positions = jnp.asarray([[3, 1000]], jnp.int32)
  tables = rotary.rotary_tables(positions, head_dim=4, theta=1e4)
  out = rotary.rotate(half, tables)
  wide = rotary.rotate(half.astype(jnp.float32), tables)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(out), np.asarray(wide.astype(jnp.bfloat16))
  )


def _turned(x, upstream, *, target):
  """A rotation and its gradient, as they are traced for such devices."""
  batch, length, head_dim = x.shape[0], x.shape[1], x.shape[-1]
  positions = 37 * jnp.arange(batch * length).reshape(batch, length)
  tables = rotary.rotary_tables(positions, head_dim=head_dim, theta=1e4)
  with compiling_for(target):
    out, pull = jax.vjp(lambda x: rotary.rotate(x, tables), x)
    return out, *pull(upstream)


@pytest.mark.parametrize("heads", [(), (2,), (2, 3)])
def test_halves_that_a_tpu_exchanges_by_a_product_are_the_same(heads):
  rng = np.random.default_rng(4)
  x, upstream = (
    jnp.asarray(rng.normal(size=(2, 5, *heads, 8)), jnp.bfloat16)
    for _ in range(2)
  )
  found, expected = (
    jax.jit(functools.partial(_turned, target=target))(x, upstream)
    for target in (_TPU, _CPU)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_remat_of_products_saves_no_exchanged_halves():
  x = jnp.ones((2, 5, 8), jnp.bfloat16)
  tables = rotary.rotary_tables(
    jnp.ones((2, 5), jnp.int32), head_dim=8, theta=1e4
  )

  def layer(kernel):
    turned = rotary.rotate(jnp.tensordot(x, kernel, axes=1), tables)
    return jnp.sum(jnp.sin(turned))

  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  with compiling_for(_TPU):
    _, pull = jax.vjp(
      jax.checkpoint(layer, policy=policy), jnp.ones((8, 8), jnp.bfloat16)
    )
  products = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
  # Of which layer() has one, beside x itself.
  assert len(products) <= 2


def _llama3_frequency(frequency: float, scaling: Llama3RopeScaling) -> float:
  """One frequency by the rule that Meta published with Llama 3.1."""
  context = scaling.original_context_length
  low_wavelength = context / scaling.low_freq_factor
  high_wavelength = context / scaling.high_freq_factor
  wavelength = 2 * math.pi / frequency
  if wavelength < high_wavelength:
    return frequency
  if wavelength > low_wavelength:
    return frequency / scaling.factor
  smooth = (context / wavelength - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize(
  ("theta", "scaling"),
  [
    # Llama 3.1 and 3.2.
    (5e5, Llama3RopeScaling(factor=8.0)),
    (5e5, Llama3RopeScaling(factor=32.0)),
    (
      1e4,
      Llama3RopeScaling(
        factor=3.0,
        low_freq_factor=2.0,
        high_freq_factor=16.0,
        original_context_length=512,
      ),
    ),
  ],
)
def test_llama3_scaling_is_the_published_rule(theta, scaling):
  head_dim = 64
  divisors = rotary.frequency_divisors(scaling, head_dim=head_dim, theta=theta)
  frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
  expected = [f / _llama3_frequency(f, scaling) for f in frequencies]
  np.testing.assert_allclose(divisors, expected, rtol=1e-12)
  # All three cases occur.
  assert np.sum(divisors == 1) > 1
  assert np.sum(divisors == scaling.factor) > 1
  assert np.sum((divisors > 1) & (divisors < scaling.factor)) > 1


def test_linear_scaling_divides_positions():
  scaling = LinearRopeScaling(factor=4.0)
  positions = jnp.asarray([[0, 4, 8, 100]], jnp.int32)
  scaled = rotary.rotary_tables(
    positions, head_dim=6, theta=100.0, scaling=scaling
  )
  plain = rotary.rotary_tables(positions // 4, head_dim=6, theta=100.0)
  for found, expected in zip(scaled, plain, strict=True):
    # Angles of at most 25, rounded to float32.
    np.testing.assert_allclose(found, expected, atol=25 * 2**-23)


def test_no_scaling_divides_nothing():
  np.testing.assert_array_equal(
    rotary.frequency_divisors(None, head_dim=6, theta=10.0), np.ones(3)
  )
