"""The Pallas kernels: interpreted without a GPU, compiled on one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn import pallas_gpu, reference
from tests.kernels.expert_ffn import contract

ON_GPU = jax.default_backend() == "gpu"
_CALL = jax.jit(functools.partial(pallas_gpu.expert_ffn, interpret=not ON_GPU))


class TestPallasGpu(contract.ExpertFfnContract):
  implementation = "pallas_gpu"

  def _call(self):
    return _CALL


@pytest.mark.parametrize("size", [16, 48, 160])
def test_blocks_and_kernels_larger_than_a_tile(size):
  """D = 80, F = 144: whole tiles and cut ones, in all three directions."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  rows, upstream = normal(4, size, 80), normal(4, size, 80)
  kernels = (normal(3, 80, 144), normal(3, 80, 144), normal(3, 144, 80))
  kernels = jax.tree.map(lambda kernel: kernel / 10, kernels)
  blocks = dict(
    block_expert=jnp.asarray([0, 2, 2, 2], jnp.int32),
    num_blocks=jnp.asarray(3, jnp.int32),
  )

  def run(call):
    def loss(rows, kernels):
      return jnp.sum(upstream * call(rows, kernels, **blocks))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(rows, kernels)

  # Sums of up to 3 * 160 products of numbers near 1: 480 * 2^-24 = 3e-5.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3),
    run(_CALL),
    run(reference.expert_ffn),
  )


@pytest.mark.skipif(ON_GPU, reason="there is one")
def test_without_a_gpu_it_is_refused():
  rows, kernels, block_expert, used = contract.inputs()
  with pytest.raises(NotImplementedError, match="'pallas_gpu' needs a GPU"):
    pallas_gpu.expert_ffn(
      rows, kernels, block_expert=block_expert, num_blocks=used
    )
