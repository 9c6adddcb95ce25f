"""Claim: on CPU a loop over blocks is the fast way to run dropless experts.

  python -m benchmarks.expert_ffn_cpu --output=benchmarks/results/NAME.json

Compares the two backends of kernels/expert_ffn with `jax.lax.ragged_dot` on
sorted rows, forward and forward with backward, in float32. A rate counts the
FLOPs of the routed rows only, so that padding costs whoever pads. It is given
as a share of a plain matmul's rate, measured in the same round: the machine's
own rate moves. Moving the rows into place is not timed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.kernels.expert_ffn import cpu_loop, reference
from aquila_jax.layers.moe import dispatch
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.layers.moe.selection import choose
from benchmarks.machine import device

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of everything.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")

_MATMULS = ((16384, 256, 1024), (4096, 4096, 4096))  # m, k, n
_MIN_S = 0.1  # a measurement repeats its call for at least so long

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """One layer's experts and the tokens of one step."""

  name: str
  num_tokens: int  # M
  embed_dim: int  # D
  mlp_dim: int  # F
  block_size: int  # Q
  num_experts: int = 8  # E
  top_k: int = 2  # A

  @property
  def forward_flops(self) -> float:
    """Three matrix products over the R = M A routed rows."""
    return 6.0 * self.num_tokens * self.top_k * self.embed_dim * self.mlp_dim


WORKLOADS = (
  Workload(
    name="quickstart",
    num_tokens=1024,
    embed_dim=128,
    mlp_dim=384,
    block_size=64,
  ),
  Workload(
    name="larger",
    num_tokens=4096,
    embed_dim=512,
    mlp_dim=1536,
    block_size=128,
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Something to time; compiled, without arguments."""

  labels: tuple[str, str, str]  # workload, pass, implementation
  flops: float
  call: Call


def _ragged(rows, kernels, *, group_sizes):
  """down(silu(x gate) * (x up)) over rows [R, D] sorted by expert."""
  gate, up, down = kernels
  hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, group_sizes))
  hidden = hidden * jax.lax.ragged_dot(rows, up, group_sizes)
  return jax.lax.ragged_dot(hidden, down, group_sizes)


def _implementations(work: Workload) -> dict[str, tuple[Callable, Any, Any]]:
  """Name -> (function, rows, kernels); all have been seen to agree."""
  rng = np.random.default_rng(0)

  def normal(*shape: int, std: float = 1.0) -> jax.Array:
    return jnp.asarray(std * rng.normal(size=shape), jnp.float32)

  num_experts, width, hidden = work.num_experts, work.embed_dim, work.mlp_dim
  tokens = normal(work.num_tokens, width)
  kernels = (
    normal(num_experts, width, hidden, std=width**-0.5),
    normal(num_experts, width, hidden, std=width**-0.5),
    normal(num_experts, hidden, width, std=hidden**-0.5),
  )
  logits = normal(work.num_tokens, num_experts)
  affinity = Affinity(
    plain=logits,
    logits=logits,
    bias=None,
    valid=jnp.ones(work.num_tokens, bool),
  )
  routing = choose(
    affinity, MoeConfig(num_experts=num_experts, top_k=work.top_k)
  )
  plan = dispatch.Dropless(work.block_size).place(routing)
  rows = plan.gather(tokens)
  blocks = dict(block_expert=plan.block_expert, num_blocks=plan.num_blocks)
  experts = routing.experts.reshape(-1)  # (M, A) -> (R,)
  order = jnp.argsort(experts, stable=True)
  sorted_rows = tokens[order // work.top_k]
  sizes = jnp.bincount(experts, length=num_experts)
  ragged = functools.partial(_ragged, group_sizes=sizes)
  loop = functools.partial(cpu_loop.expert_ffn, **blocks)
  gathered = functools.partial(reference.expert_ffn, **blocks)

  expected = jax.jit(ragged)(sorted_rows, kernels)
  for function in (loop, gathered):
    out = jax.jit(function)(rows, kernels).reshape(-1, width)
    np.testing.assert_allclose(out[plan.slot[order]], expected, atol=1e-4)
  return {
    "cpu_loop": (loop, rows, kernels),
    "xla": (gathered, rows, kernels),
    "ragged_dot": (ragged, sorted_rows, kernels),
  }


def _cases(work: Workload) -> list[Case]:
  cases = []
  for name, (function, rows, kernels) in _implementations(work).items():

    def loss(rows, kernels, function=function):
      return jnp.sum(jnp.square(function(rows, kernels)))

    passes = {
      "forward": (1, jax.jit(function)),
      "forward+backward": (3, jax.jit(jax.value_and_grad(loss, (0, 1)))),
    }
    cases += [
      Case(
        labels=(work.name, direction, name),
        flops=factor * work.forward_flops,
        call=functools.partial(jitted, rows, kernels),
      )
      for direction, (factor, jitted) in passes.items()
    ]
  # The three implementations of a pass beside each other.
  return sorted(cases, key=lambda case: case.labels[1])


def _matmul_cases() -> list[Case]:
  rng = np.random.default_rng(0)
  cases = []
  for m, k, n in _MATMULS:
    a = jnp.asarray(rng.normal(size=(m, k)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(k, n)), jnp.float32)
    cases.append(
      Case(
        labels=("matmul", "forward", f"{m}x{k}x{n}"),
        flops=2.0 * m * k * n,
        call=functools.partial(jax.jit(jnp.matmul), a, b),
      )
    )
  return cases


def _rate(case: Case) -> float:
  """FLOPs a second over at least _MIN_S."""
  calls, start = 0, time.perf_counter()
  while (elapsed := time.perf_counter() - start) < _MIN_S:
    jax.block_until_ready(case.call())
    calls += 1
  return calls * case.flops / elapsed


def measure(rounds: int) -> dict[str, Any]:
  """Every case once a round; medians over the rounds, as the JSON has them."""
  matmuls = _matmul_cases()
  cases = [case for work in WORKLOADS for case in _cases(work)]
  for case in (*matmuls, *cases):
    jax.block_until_ready(case.call())  # compiles
  ceilings: list[float] = []
  rates: list[list[float]] = []
  for i in range(rounds):
    print(f"round {i + 1} of {rounds}", flush=True)
    ceilings.append(max(_rate(case) for case in matmuls))
    rates.append([_rate(case) for case in cases])
  results = []
  for case, measured in zip(cases, zip(*rates, strict=True), strict=True):
    shares = [r / c for r, c in zip(measured, ceilings, strict=True)]
    workload, direction, implementation = case.labels
    results.append(
      dict(
        workload=workload,
        direction=direction,
        implementation=implementation,
        milliseconds=_rounded(1e3 * case.flops / statistics.median(measured)),
        of_matmul=_rounded(statistics.median(shares)),
        of_matmul_range=[_rounded(min(shares)), _rounded(max(shares))],
      )
    )
  return dict(
    benchmark="expert_ffn_cpu",
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    device=device(),
    versions=dict(
      python=platform.python_version(),
      jax=jax.__version__,
      jaxlib=importlib.metadata.version("jaxlib"),
    ),
    rounds=rounds,
    matmul_gflops=_rounded(statistics.median(ceilings) / 1e9),
    matmul_gflops_range=[
      _rounded(min(ceilings) / 1e9),
      _rounded(max(ceilings) / 1e9),
    ],
    workloads=[dataclasses.asdict(work) for work in WORKLOADS],
    results=results,
  )


def _rounded(value: float) -> float:
  return float(f"{value:.3g}")


def _table(report: dict[str, Any]) -> str:
  lines = [
    f"{report['device']}; jax {report['versions']['jax']};"
    f" matmul {report['matmul_gflops']:g} GFLOP/s",
    f"{'workload':<12}{'pass':<18}{'implementation':<16}{'ms':>8}"
    f"{'of matmul':>11}{'range':>16}",
  ]
  for row in report["results"]:
    low, high = row["of_matmul_range"]
    lines.append(
      f"{row['workload']:<12}{row['direction']:<18}"
      f"{row['implementation']:<16}{row['milliseconds']:>8.3g}"
      f"{row['of_matmul']:>11.1%}{f'{low:.1%} to {high:.1%}':>16}"
    )
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  jax.config.update("jax_platforms", "cpu")
  report = measure(_ROUNDS.value)
  print(_table(report))
  if _OUTPUT.value:
    text = json.dumps(report, indent=2) + "\n"
    pathlib.Path(_OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
