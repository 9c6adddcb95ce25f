"""What every backend of attention must do; a subclass names the backend.

The oracle goes over rows, heads and queries in float64, with the derivatives
written out, and shares nothing with the backends.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Rows of documents and padding, in parts of the row.
_PACKINGS = {
  # One document; many short ones and padding at the end.
  "packed": ([1.0], [0.15, 0.3, 0.02, 0.33]),
  # Padding at the start and between, a number that comes again, and one that is
  # large and negative.
  "odd": ([-0.2, 0.3, -0.1, 0.2, 0.2], [0.4, 0.25, 0.1]),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A call: B = 2 rows of `length`, K key heads of G queries of width H."""

  length: int
  num_kv_heads: int = 2
  group_size: int = 2
  head_dim: int = 8
  window: int | None = None
  packing: str = "packed"

  def __str__(self) -> str:
    return "-".join(f"{value}" for value in dataclasses.astuple(self))


def segments(case: Case) -> np.ndarray:
  """Document numbers, [2, T]; those of a negative part are padding."""
  rows = np.zeros((2, case.length), np.int32)
  for row, parts in zip(rows, _PACKINGS[case.packing], strict=True):
    ends = np.round(np.cumsum(np.abs(parts)) * case.length).astype(int)
    starts = [0, *ends[:-1]]
    for i, (part, start, end) in enumerate(
      zip(parts, starts, ends, strict=True)
    ):
      row[start:end] = 0 if part < 0 else i + 1
    if case.packing == "odd":
      row[row == 4] = 2
      row[row == 3] = -(2**31)
  return rows


def inputs(case: Case, dtype=jnp.float32) -> list[jax.Array]:
  """Query, key, value and the gradient of the output."""
  rng = np.random.default_rng(0)
  keys = (2, case.length, case.num_kv_heads, case.head_dim)
  heads = (*keys[:3], case.group_size, case.head_dim)
  return [
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in (heads, keys, keys, heads)
  ]


def by_loops(
  arguments, upstream, *, segments, window
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """The output and the derivatives of sum(upstream * output)."""
  query, key, value, upstream = (
    np.asarray(x, np.float64) for x in (*arguments, upstream)
  )
  scale = query.shape[-1] ** -0.5
  out, *grads = (np.zeros_like(x) for x in (query, query, key, value))
  query_grad, key_grad, value_grad = grads
  for b, t, k, g in np.ndindex(query.shape[:4]):
    first = 0 if window is None else max(t - window + 1, 0)
    slots = np.arange(first, t + 1)
    seen = slots[segments[b, slots] == segments[b, t]]
    q, keys, values = query[b, t, k, g], key[b, seen, k], value[b, seen, k]
    weights = np.exp(scale * keys @ q - np.max(scale * keys @ q))
    weights /= weights.sum()
    out[b, t, k, g] = weights @ values
    up = upstream[b, t, k, g]
    weight_grad = values @ up
    logit_grad = scale * weights * (weight_grad - weights @ weight_grad)
    query_grad[b, t, k, g] = logit_grad @ keys
    key_grad[b, seen, k] += np.outer(logit_grad, q)
    value_grad[b, seen, k] += np.outer(weights, up)
  return out, tuple(grads)


def product(
  *, length: int, head_dim: int = 8, windows: tuple[int | None, ...]
) -> list[Case]:
  """Windows, heads and packings in a product."""
  return [
    Case(
      length=length,
      head_dim=head_dim,
      window=window,
      num_kv_heads=num_kv_heads,
      group_size=group_size,
      packing=packing,
    )
    for window in windows
    for num_kv_heads, group_size in ((2, 2), (3, 1), (1, 3))
    for packing in _PACKINGS
  ]


# Of a difference, over the largest number expected, or 1 where that is less. In
# float32: four sums in a chain of up to 256 terms, 4 * 16 * 2^-24 = 4e-6, of
# terms up to twice their sum. In bfloat16: queries, weights, heads and three
# derivatives are rounded, by 2^-8 of themselves at most.
_TOLERANCES = {"float32": 1e-5, "bfloat16": 6 * 2.0**-8}


def assert_close(found, expected, *, dtype) -> None:
  """Within what the dtype rounds."""
  assert found.dtype == dtype
  size = max(1.0, float(np.max(np.abs(expected))))
  np.testing.assert_allclose(
    np.asarray(found, np.float64),
    expected,
    rtol=0,
    atol=size * _TOLERANCES[jnp.dtype(dtype).name],
  )


class AttentionContract:
  """Subclasses say what they call, and on what."""

  cases: list[Case]
  dtypes: tuple[Any, ...] = (jnp.float32, jnp.bfloat16)

  def call(self, query, key, value, *, segments, window):
    """The backend."""
    raise NotImplementedError

  def pytest_generate_tests(self, metafunc):
    """Every test is of every case, and of every dtype that is computed in."""
    metafunc.parametrize("case", self.cases, ids=str)
    if "dtype" in metafunc.fixturenames:
      names = [jnp.dtype(dtype).name for dtype in self.dtypes]
      metafunc.parametrize("dtype", self.dtypes, ids=names)

  def test_output_and_gradients_equal_loops(self, case, dtype):
    *arguments, upstream = inputs(case, dtype)
    rows = segments(case)
    expected, expected_grads = by_loops(
      arguments, upstream, segments=rows, window=case.window
    )

    @jax.jit
    def both(query, key, value, upstream):
      call = functools.partial(
        self.call, segments=jnp.asarray(rows), window=case.window
      )
      out, pull = jax.vjp(call, query, key, value)
      return out, pull(upstream)

    found, grads = both(*arguments, upstream)
    assert_close(found, expected, dtype=dtype)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
      assert_close(grad, expected_grad, dtype=dtype)

  def test_what_a_query_may_not_see_changes_nothing(self, case):
    dtype = self.dtypes[0]
    query, key, value, _ = inputs(case, dtype)
    rows = segments(case)
    call = jax.jit(
      functools.partial(
        self.call, segments=jnp.asarray(rows), window=case.window
      )
    )
    number = rows[0, case.length // 2]
    own = jnp.asarray(rows == number)[..., None, None]
    found = call(
      query,
      jnp.where(own, key, jnp.asarray(50, dtype)),
      jnp.where(own, value, jnp.asarray(50, dtype)),
    )
    expected = call(query, key, value)
    np.testing.assert_array_equal(
      np.asarray(found)[rows == number], np.asarray(expected)[rows == number]
    )
