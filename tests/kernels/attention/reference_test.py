"""The plain XLA backend, and its mask as literal matrices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.kernels.attention import api, reference
from tests.kernels.attention import contract


class TestXla(contract.AttentionContract):
  cases = contract.product(length=24, windows=(None, 1, 5))

  def call(self, query, key, value, *, segments, window):
    return api.causal_attention(
      query,
      key,
      value,
      segments=segments,
      window=window,
      implementation="xla",
    )


def test_mask_is_causal_within_documents():
  mask = reference.causal_mask(
    jnp.asarray([[1, 1, 2, 2, 0]]), jnp.asarray([[1, 1, 2, 2, 0]])
  )
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 1],
  ]
  np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_mask_with_an_offset_sees_the_slots_before():
  mask = reference.causal_mask(
    jnp.asarray([[1, 1]]), jnp.asarray([[1, 2, 1, 1, 0]]), offset=2
  )
  expected = [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]
  np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_mask_of_a_window_sees_so_many_slots_back():
  segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2]])
  mask = reference.causal_mask(segments, segments, window=3)
  expected = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [0, 1, 1, 1, 0, 0, 0],
    # The second document's window ends at its border.
    [0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 1, 1, 0],
    [0, 0, 0, 0, 1, 1, 1],
  ]
  np.testing.assert_array_equal(mask[0], np.array(expected, bool))
  own = reference.causal_mask(segments, segments, window=1)
  np.testing.assert_array_equal(own[0], np.eye(7, dtype=bool))
  for window in (7, 100):
    np.testing.assert_array_equal(
      reference.causal_mask(segments, segments, window=window),
      reference.causal_mask(segments, segments),
    )


def test_mask_of_a_window_counts_from_the_offset():
  mask = reference.causal_mask(
    jnp.asarray([[1, 1]]),
    jnp.asarray([[1, 1, 1, 1, 1, 0]]),
    offset=3,
    window=2,
  )
  expected = [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
  np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_half_precision_logits_are_float32():
  query, key = jnp.ones((1, 2, 1, 1, 4)), jnp.ones((1, 2, 1, 4))
  args = [a.astype(jnp.bfloat16) for a in (query, key, key)]
  mask = jnp.ones((1, 2, 2), bool)
  jaxpr = jax.make_jaxpr(functools.partial(reference.attend, mask=mask))(*args)
  products = [
    e.outvars[0].aval.dtype
    for e in jaxpr.jaxpr.eqns
    if e.primitive.name == "dot_general"
  ]
  assert products[0] == jnp.float32
  assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_float64_is_computed_in_float64():
  case = contract.Case(length=24)
  with jax.enable_x64(True):
    *arguments, upstream = contract.inputs(case, jnp.float64)
    rows = contract.segments(case)
    found = {
      name: jax.jit(
        functools.partial(
          api.causal_attention,
          segments=jnp.asarray(rows),
          implementation=name,
        )
      )(*arguments)
      for name in ("xla", "chunked")
    }
  expected, _ = contract.by_loops(
    arguments, upstream, segments=rows, window=None
  )
  # Sums of 24 terms below 3: 3 * 24 * 2^-53 = 8e-15.
  for out in found.values():
    np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=1e-14)
