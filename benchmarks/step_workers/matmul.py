"""Worker: the matmul rate of JAX, or of torch."""

from __future__ import annotations

import argparse
import functools
import importlib
from typing import Any

from benchmarks.step_workers import protocol

SHAPES = ((16384, 256, 1024), (4096, 4096, 4096))  # m, k, n


def name(m: int, k: int, n: int) -> str:
  """Of the case of one product."""
  return f"{m}x{k}x{n}"


def _start_jax(m: int, k: int, n: int) -> tuple[protocol.Step, dict[str, Any]]:
  jax: Any = importlib.import_module("jax")
  jax.config.update("jax_platforms", "cpu")
  keys = jax.random.split(jax.random.key(0))
  a = jax.random.normal(keys[0], (m, k))
  b = jax.random.normal(keys[1], (k, n))
  product = jax.jit(jax.numpy.matmul)

  def step() -> float:
    product(a, b).block_until_ready()
    return 0.0

  return step, {}


def _start_torch(
  m: int, k: int, n: int, *, threads: int
) -> tuple[protocol.Step, dict[str, Any]]:
  torch: Any = importlib.import_module("torch")
  torch.set_num_threads(threads)
  a, b = torch.randn(m, k), torch.randn(k, n)

  def step() -> float:
    torch.mm(a, b)
    return 0.0

  return step, {}


def main() -> None:
  """Serves both products."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--framework", choices=("jax", "torch"), required=True)
  parser.add_argument("--threads", type=int, default=1)
  flags = parser.parse_args()
  start = _start_jax
  if flags.framework == "torch":
    start = functools.partial(_start_torch, threads=flags.threads)
  protocol.serve(
    {name(*sizes): functools.partial(start, *sizes) for sizes in SHAPES}
  )


if __name__ == "__main__":
  main()
