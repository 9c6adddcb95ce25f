"""Attention some queries at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.attention import api, chunked, reference
from tests.kernels.attention import contract


class _Chunked(contract.AttentionContract):
  @pytest.fixture(autouse=True)
  def _small_blocks(self, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 4)

  def call(self, query, key, value, *, segments, window):
    return api.causal_attention(
      query,
      key,
      value,
      segments=segments,
      window=window,
      implementation="chunked",
    )


class TestWholeBlocks(_Chunked):
  """Two runs of one block, and with a window one of two."""

  cases = contract.product(length=8, windows=(None, 1, 5))[::5]


class TestAnyLength(_Chunked):
  """T = 43: ten blocks in eight runs, and three queries more."""

  cases = contract.product(length=43, windows=(None, 3, 9, 100))[::5]


class TestShorterThanABlock(_Chunked):
  cases = contract.product(length=3, windows=(None, 2))[::4]


@pytest.mark.parametrize("window", [None, 200])
def test_no_scores_of_the_whole_row_are_held(window):
  """T = 2048, N = 8: [N, T, T] in float32 is 128 MiB, a block's 8 MiB."""
  case = contract.Case(length=2048, num_kv_heads=2, group_size=4, window=window)
  query, key, value, upstream = contract.inputs(case)
  query, key, value, upstream = (x[:1] for x in (query, key, value, upstream))
  rows = jnp.asarray(contract.segments(case)[:1])

  def temporaries(backend) -> int:
    def both(query, key, value):
      def call(*x):
        return backend.causal_attention(*x, segments=rows, window=window)

      out, pull = jax.vjp(call, query, key, value)
      return out, pull(upstream)

    compiled = jax.jit(both).lower(query, key, value).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes

  whole = 4 * 8 * 2048**2
  assert temporaries(reference) > whole
  # Logits, weights, their gradients and masks of a block: 8 MiB each.
  assert temporaries(chunked) < whole / 2


def test_gradients_of_keys_are_summed_in_float32(monkeypatch):
  """A key of 512 queries in 128 blocks: rounded sums would stall."""
  monkeypatch.setattr(chunked, "BLOCK", 4)
  ones = jnp.ones((1, 512, 1, 8), jnp.bfloat16)

  def total(value):
    heads = chunked.causal_attention(
      ones[:, :, :, None],
      ones,
      value,
      segments=jnp.ones((1, 512), jnp.int32),
    )
    return jnp.sum(heads.astype(jnp.float32))

  found = jax.jit(jax.grad(total))(ones)[0, :, 0, 0]
  # Query t gives 1 / (t + 1), in bfloat16, to each of its keys.
  weights = (1 / np.arange(1, 513)).astype(jnp.bfloat16).astype(np.float64)
  expected = np.cumsum(weights[::-1])[::-1]
  # One rounding to bfloat16, and one for the sum within a block.
  np.testing.assert_allclose(
    np.asarray(found, np.float64), expected, rtol=2 * 2.0**-8
  )
