"""NaN and infinity are found in every dtype, and beyond the first piece."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.interop.tensors import count_not_finite, has_only_finite


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "bf16"])
def test_what_is_not_finite_is_found_and_counted(dtype):
  value = np.ones((3, 4), jnp.bfloat16 if dtype == "bf16" else dtype)
  assert has_only_finite(value)
  assert count_not_finite(value) == 0
  value[2, 3], value[0, 0] = np.nan, -np.inf
  assert not has_only_finite(value)
  assert count_not_finite(value.T) == 2


def test_large_numbers_of_float64_are_finite():
  assert has_only_finite(np.full((2,), 1e300))


def test_arrays_of_several_pieces_are_searched_to_their_end():
  value = np.zeros((2**22 + 3,), np.float32)  # pieces of 2^22
  assert has_only_finite(value)
  value[-1] = np.inf
  assert not has_only_finite(value)
  assert count_not_finite(value) == 1
