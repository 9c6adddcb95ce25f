"""Rotary position embeddings (RoPE), arXiv 2104.09864."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from aquila_jax.core import dtypes
from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
  RopeScaling,
)
from aquila_jax.kernels.target import target


def frequency_divisors(
  scaling: RopeScaling | None, *, head_dim: int, theta: float
) -> Float[np.ndarray, " H2"]:
  """What each of the H / 2 rotary frequencies is divided by; ones for None.

  The rules are in the docstrings of the `RopeScaling` classes; Llama 3's is in
  no paper, only in its published code.
  """
  if scaling is None:
    return np.ones(head_dim // 2)
  if isinstance(scaling, LinearRopeScaling):
    return np.full(head_dim // 2, scaling.factor)
  assert isinstance(scaling, Llama3RopeScaling)
  wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_context_length / wavelength
  kept = np.clip((turns - low) / (high - low), 0, 1)  # 1 is kept, 0 divided
  return 1 / (kept + (1 - kept) / scaling.factor)


# Cosines and sines.
Tables = tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]


def tables_of(config: ModelConfig, positions: Int[Array, "B T"]) -> Tables:
  """Of a model; the same for all of its layers."""
  return rotary_tables(
    positions,
    head_dim=config.head_dim,
    theta=config.rope_theta,
    scaling=config.rope_scaling,
  )


def rotary_tables(
  positions: Int[Array, "B T"],
  *,
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
) -> Tables:
  """Cosine and sine of position * theta^(-2i / H), float32, H2 = H / 2.

  Args:
    positions: of the tokens.
    head_dim: H.
    theta: the base.
    scaling: divides the frequencies; None leaves them.

  Returns:
    The two tables.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  divisors = frequency_divisors(scaling, head_dim=head_dim, theta=theta)
  frequency = theta**-exponent / jnp.asarray(divisors, jnp.float32)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x: Float[Array, "B T *heads H"],
  tables: Tables,
) -> Float[Array, "B T *heads H"]:
  """Rotates each pair (x[i], x[i + H/2]) by its position's angle.

  The two halves are paired as in GPT-NeoX and Llama's Hugging Face layout, not
  neighbours as in the paper; a fixed permutation of H lies between the two.

  Args:
    x: queries or keys, with any number of head axes between T and H.
    tables: from `rotary_tables` for the same positions.

  Returns:
    The rotated array, in the dtype of `x`.
  """
  if target().platform == "tpu" and x.dtype == jnp.bfloat16:
    return _rotated(x, *tables)
  cos, sin = _beside_heads(tables, like=x)
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def _beside_heads(
  tables: Tables, *, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
  head_axes = tuple(range(2, like.ndim - 1))
  dtype = dtypes.at_least_float32(like.dtype)
  cos, sin = (jnp.expand_dims(x, head_axes).astype(dtype) for x in tables)
  return cos, sin


@jax.custom_vjp
def _rotated(x, cos, sin):
  """`rotate` with both halves in one vector of lanes, for TPUs.

  Halves of 64 lanes the compiler writes to arrays of their own, which it copies
  and puts together again. The matrix unit exchanges them at once: each of its
  sums has one product, by one, so bfloat16 stays what it is.
  """
  half = x.shape[-1] // 2
  exchange = np.roll(np.eye(2 * half), half, axis=1)
  other = jnp.tensordot(x, jnp.asarray(exchange, x.dtype), axes=1)
  cos, sin = _beside_heads((cos, sin), like=x)
  cos = jnp.concatenate([cos, cos], axis=-1)
  sin = jnp.concatenate([-sin, sin], axis=-1)
  rotated = x.astype(cos.dtype) * cos + other.astype(cos.dtype) * sin
  return rotated.astype(x.dtype)


def _rotated_forward(x, cos, sin):
  return _rotated(x, cos, sin), (cos, sin)


def _rotated_backward(tables, upstream):
  """Turned back; positions are whole numbers and have no gradient."""
  cos, sin = tables
  return _rotated(upstream, cos, -sin), None, None


_rotated.defvjp(_rotated_forward, _rotated_backward)
