"""Claim: on a GPU, routing takes a fraction of the time of XLA and torch.

  python -m benchmarks.topk_routing_gpu --output=benchmarks/results/NAME.json

The kernel (kernels/topk_routing/pallas_gpu.py) with several sizes of programs,
the same outputs from jitted XLA (reference.py), and from torch.compile where
torch is there; forward, and forward with the gradient of the logits. Beside a
time stands the part of a copy's rate at which logits are read and everything
else is written once: what no implementation can exceed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from aquila_jax.kernels.topk_routing.api import Backend
from aquila_jax.kernels.topk_routing.pallas_gpu import (
  GpuBlocks,
  PallasGpu,
  default_blocks,
)
from aquila_jax.kernels.topk_routing.reference import Xla
from aquila_jax.kernels.topk_routing.rule import Gradients
from aquila_jax.kernels.topk_routing.shapes import NAMED, Workload
from benchmarks import gpu_clock
from benchmarks.topk_routing_schedule import functions

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_TOKENS = flags.DEFINE_multi_integer("tokens", [8192, 32768], "Tokens.", 1)
_SMALL = flags.DEFINE_bool("small", False, "Few tokens and calls: does it run?")
Row = dict[str, Any]


def _candidates(work: Workload) -> Iterator[tuple[str, GpuBlocks]]:
  default = default_blocks(work.num_experts)
  yield "kernel", default
  for tokens in {max(1, default.tokens // 2), default.tokens * 2}:
    for groups in (1, 4, 16):
      for warps in (1, 2, 4):
        yield (
          f"{groups} x {tokens} tokens, {warps} warps",
          GpuBlocks(tokens=tokens, groups=groups, warps=warps),
        )


def _bytes(work: Workload, num_tokens: int, direction: str) -> int:
  """Logits and [M A] outputs once; with backward logits and gates again."""
  logits, chosen = work.num_experts, work.top_k
  each = logits + 4 * chosen
  if direction != "forward":
    each += 2 * logits + 4 * chosen
  return 4 * each * num_tokens


def _inputs(work: Workload, num_tokens: int) -> tuple[jax.Array, Gradients]:
  normal = np.random.default_rng(0).normal

  def array(*shape: int) -> jax.Array:
    return jnp.asarray(normal(size=shape), jnp.float32)

  grads = Gradients(
    gates=array(num_tokens, work.top_k),
    probability=array(1, work.num_experts),
    z=array(),
  )
  return array(num_tokens, work.num_experts), grads


def _by_jax(
  backend: Backend, work: Workload, *, num_tokens: int, calls: int
) -> Iterator[Row]:
  logits, grads = _inputs(work, num_tokens)
  forward, both = functions(backend, work)
  for direction, function, arguments in (
    ("forward", forward, (logits,)),
    ("forward+backward", both, (logits, grads)),
  ):
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = gpu_clock.seconds(
      functools.partial(compiled, *arguments), calls=calls, rounds=5
    )
    yield dict(direction=direction, microseconds=1e6 * seconds)


def _by_torch(work: Workload, *, num_tokens: int, calls: int) -> Iterator[Row]:
  """The same from torch.compile, with its own gradient."""
  import torch  # pyright: ignore[reportMissingImports]

  def forward(logits):
    chosen, experts = torch.topk(logits, work.top_k, dim=-1)
    gates = torch.softmax(chosen, dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    p = torch.softmax(logits, dim=-1)
    ones = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    ones = ones.scatter(1, experts, 1)
    earlier = torch.cumsum(ones, dim=0, dtype=torch.int32) - ones
    positions = torch.gather(earlier, 1, experts)
    entropy = -torch.sum(torch.xlogy(p.detach(), p.detach()))
    sums = p.sum(dim=0), torch.sum(lse * lse), entropy
    return gates, experts, positions, ones.sum(dim=0), *sums

  def both(logits, gates_grad, probability_grad, z_grad):
    gates, experts, positions, counts, probability, z, entropy = forward(logits)
    loss = torch.sum(gates * gates_grad) + z * z_grad
    loss = loss + torch.sum(probability * probability_grad)
    (grad,) = torch.autograd.grad(loss, logits)
    return gates, experts, positions, counts, probability, z, entropy, grad

  logits, grads = _inputs(work, num_tokens)
  arguments = [
    torch.from_numpy(np.array(x)).cuda()
    for x in (logits, grads.gates, grads.probability[0], grads.z)
  ]
  plain = torch.compile(forward)
  graded = torch.compile(both)
  arguments[0].requires_grad_()

  def without_gradient():
    with torch.no_grad():
      return plain(arguments[0])

  for direction, call in (
    ("forward", without_gradient),
    ("forward+backward", lambda: graded(*arguments)),
  ):
    seconds = _cuda_seconds(call, calls=calls)
    yield dict(direction=direction, microseconds=1e6 * seconds)


def _cuda_seconds(call: Callable[[], Any], *, calls: int) -> float:
  """As gpu_clock.seconds, of torch's stream."""
  import torch  # pyright: ignore[reportMissingImports]

  for _ in range(3):
    call()
  times = []
  for _ in range(5):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
      call()
    end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end) / 1e3 / calls)
  return statistics.median(times)


def _rows(work: Workload, *, num_tokens: int, calls: int) -> Iterator[Row]:
  for name, blocks in _candidates(work):
    backend = PallasGpu(blocks=blocks)
    shape = dataclasses.asdict(blocks)
    for row in _by_jax(backend, work, num_tokens=num_tokens, calls=calls):
      yield dict(implementation=name, blocks=shape, **row)
  for row in _by_jax(Xla(), work, num_tokens=num_tokens, calls=calls):
    yield dict(implementation="xla", **row)
  if importlib.util.find_spec("torch") is not None:
    for row in _by_torch(work, num_tokens=num_tokens, calls=calls):
      yield dict(implementation="torch.compile", **row)


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  copied = gpu_clock.copy_bytes()
  print(f"copy {copied / 1e12:.2f} TB/s", flush=True)
  calls = 3 if _SMALL.value else 100
  results = []
  for num_tokens in [256] if _SMALL.value else _TOKENS.value:
    for work in NAMED:
      for row in _rows(work, num_tokens=num_tokens, calls=calls):
        moved = _bytes(work, num_tokens, row["direction"])
        row |= dict(
          num_experts=work.num_experts,
          top_k=work.top_k,
          num_tokens=num_tokens,
          of_copy=moved / copied / (row["microseconds"] / 1e6),
        )
        results.append(row)
        print(
          f"{work!s:>8}{num_tokens:>8}  {row['implementation']:<28}"
          f"{row['direction']:<18}{row['microseconds']:>9.1f} us"
          f"{row['of_copy']:>8.1%} of a copy",
          flush=True,
        )
  gpu_clock.write_report(
    _OUTPUT.value,
    benchmark="topk_routing_gpu",
    copy_bytes_per_s=copied,
    results=results,
  )


if __name__ == "__main__":
  app.run(main)
