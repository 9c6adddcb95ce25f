"""Half precision widens to float32; float64 stays."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from aquila_jax.core import dtypes


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "float32"),
    ("float64", "float64"),
  ],
)
def test_at_least_float32(given, expected):
  assert dtypes.at_least_float32(jnp.dtype(given)) == jnp.dtype(expected)
