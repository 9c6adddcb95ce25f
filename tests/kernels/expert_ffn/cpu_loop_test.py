"""The loop over blocks in use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn import cpu_loop
from tests.kernels.expert_ffn import contract


class TestCpuLoop(contract.ExpertFfnContract):
  implementation = "cpu_loop"


def _many_blocks():
  """P = 20 blocks of Q = 32 rows; experts have 11, 0, 6 and 2 in use, 19."""
  rng = np.random.default_rng(2)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  kernels = (normal(4, 4, 6), normal(4, 4, 6), normal(4, 6, 4))
  block_expert = jnp.repeat(
    jnp.asarray([0, 2, 3], jnp.int32), jnp.asarray([11, 6, 3])
  )
  return normal(20, 32, 4), kernels, block_expert, jnp.asarray(19)


def test_chunks_hold_every_block_in_use_once(monkeypatch):
  _, _, block_expert, used = _many_blocks()
  monkeypatch.setattr(cpu_loop, "_CHUNK_ROWS", (256, 128))
  plan = cpu_loop._chunks(block_expert, used, num_experts=4, block_size=32)
  found = [
    (chunks.size, int(chunks.first_block[i]), int(chunks.expert[i]))
    for chunks in plan
    for i in range(int(chunks.count))
  ]
  assert found == [
    (8, 0, 0),
    (4, 11, 2),
    *((1, block, 0) for block in (8, 9, 10)),
    *((1, block, 2) for block in (15, 16)),
    *((1, block, 3) for block in (17, 18)),
  ]


@pytest.mark.parametrize("chunk_rows", [(), (256, 128), (512, 256)])
def test_chunks_change_neither_output_nor_gradients(monkeypatch, chunk_rows):
  rows, kernels, block_expert, used = _many_blocks()
  monkeypatch.setattr(cpu_loop, "_CHUNK_ROWS", chunk_rows)
  blocks = dict(block_expert=block_expert, num_blocks=used)

  def fast(rows, kernels):
    return cpu_loop.expert_ffn(rows, kernels, **blocks)

  np.testing.assert_allclose(
    jax.jit(fast)(rows, kernels),
    contract.by_loops(rows, kernels, **blocks),
    atol=contract.ATOL,
  )
  rng = np.random.default_rng(3)
  upstream = jnp.asarray(rng.normal(size=rows.shape), jnp.float32)
  found = jax.jit(jax.grad(lambda *a: jnp.sum(upstream * fast(*a)), (0, 1)))(
    rows, kernels
  )
  expected = contract.gradients_by_loops(rows, kernels, upstream, **blocks)
  np.testing.assert_allclose(
    found[0], expected[0], atol=contract.atol(expected[0])
  )
  # Sums of up to 352 rows, where the contract has 9: 40 times as much rounding.
  for one, other in zip(found[1], expected[1], strict=True):
    np.testing.assert_allclose(one, other, atol=40 * contract.ATOL)


@pytest.mark.parametrize(
  ("block_size", "sizes"),
  [(64, [8, 4, 1]), (128, [4, 2, 1]), (300, [1]), (640, [1]), (48, [10, 5, 1])],
)
def test_chunks_have_at_most_512_rows_or_are_blocks(block_size, sizes):
  plan = cpu_loop._chunks(
    jnp.zeros(12, jnp.int32),
    jnp.asarray(12),
    num_experts=2,
    block_size=block_size,
  )
  assert [chunks.size for chunks in plan] == sizes
