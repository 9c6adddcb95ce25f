"""The peak of the hardware, for MFU."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging

from aquila_jax.core.types import Device

# Dense bfloat16 FLOPs a second of one jax.Device, as the vendors state them.
# A TPU v7x chip is two devices. Longer names come first.
_PEAK_BF16 = (
  ("TPU v4", 275e12),
  ("TPU v5 lite", 197e12),
  ("TPU v5e", 197e12),
  ("TPU v5", 459e12),
  ("TPU v6 lite", 918e12),
  ("TPU v6e", 918e12),
  ("TPU7x", 2307e12 / 2),
  ("H100 PCIe", 756e12),
  ("H100", 989e12),
  ("H200", 989e12),
  ("A100", 312e12),
)
_SIZES = (256, 512, 1024, 2048, 4096, 8192)  # rows and columns of the matrices
_BUDGET_S = 0.3


def peak_flops(devices: Sequence[Device]) -> float:
  """FLOPs a second that the devices could do together.

  Known for TPUs and data-centre GPUs; measured with float32 matrix products on
  anything else. CPU devices are slices of one machine, so their number does not
  count.
  """
  kind = devices[0].device_kind
  known = known_peak_flops(kind)
  if known is not None:
    return known * len(devices)
  measured = measure_matmul_flops(devices[0])
  logging.info("measured a peak of %.1f GFLOP/s on %s", measured / 1e9, kind)
  return measured * (1 if devices[0].platform == "cpu" else len(devices))


def known_peak_flops(device_kind: str) -> float | None:
  """The stated bfloat16 peak of one device, or None where it is not known."""
  for name, flops in _PEAK_BF16:
    if name.lower() in device_kind.lower():
      return flops
  return None


@functools.cache
def measure_matmul_flops(device: Device) -> float:
  """FLOPs a second of the best of a few square float32 matrix products.

  Runs for at most about 0.3 s beside compilation. An n x n product is 2 n^3
  FLOPs.
  """
  product = jax.jit(jnp.matmul)
  best = 0.0
  spent = 0.0
  for size in _SIZES:
    flops = 2 * size**3
    # The warm-up and one run at the rate found so far must fit.
    if best and spent + 2 * flops / best > _BUDGET_S:
      break
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    jax.block_until_ready(product(matrix, matrix))
    for _ in range(3):
      start = time.perf_counter()
      jax.block_until_ready(product(matrix, matrix))
      seconds = time.perf_counter() - start
      best = max(best, flops / seconds)
      spent += seconds
  return best
