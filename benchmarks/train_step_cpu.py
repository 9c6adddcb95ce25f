"""Claim: on CPU a training step is as fast as transformers', and as MaxText's.

  python -m benchmarks.train_step_cpu --maxtext_python=PATH --output=FILE

Steps of float32 AdamW on 8 x 256 random tokens (step_workers/shape.py has the
sizes): a mixture of 8 experts of 1024, of which a token meets two, in 4 layers
of width 256; and a dense model with an FFN as large as two experts. Ours,
transformers' Mixtral (grouped_mm experts) and Llama in torch, and MaxText's
own step, each with its default allocator and with glibc's made to keep what is
freed and to ask for huge pages; ours as well with `keep_freed_memory`, which a
command can do by itself.

A process for each side and allocator; a round has each of them take a few
steps in turn, after one that does not count, while all others wait, with
matmuls in between (best of 16384x256x1024 and 4096^3, of JAX and torch). FLOPs
are counted by one formula for all sides, planning/counting.py: 3 * forward, of
the matrix products that a token needs. Numbers are medians over the rounds, and
ranges.

It needs torch and transformers; MaxText's row needs a Python 3.12 that has
MaxText, and is left out without --maxtext_python.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from aquila_jax.planning import counting
from benchmarks.machine import device
from benchmarks.step_workers import aquila, matmul, shape
from benchmarks.step_workers.protocol import Worker

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of everything.", 1)
_STEPS: Any = flags.DEFINE_integer("steps", 3, "Of a case in a round.", 1)
_THREADS: Any = flags.DEFINE_integer(
  "threads", os.cpu_count(), "Of torch; JAX takes all cores.", 1
)
_TORCH_PYTHON = flags.DEFINE_string(
  "torch_python", sys.executable, "A Python with torch and transformers."
)
_MAXTEXT_PYTHON = flags.DEFINE_string(
  "maxtext_python", None, "A Python with MaxText; without it, no such row."
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")

_TUNED = {
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
  ":glibc.malloc.mmap_threshold=4294967296"
  ":glibc.malloc.trim_threshold=17179869184"
}
_ALLOCATORS = {"default": {}, "tuned": _TUNED}
# What ours are compared with, by the mixture; of the time of a peer's step.
_BARS = {"transformers": 0.9, "MaxText": 1.6}
_FIRST_STEP_BAR_S = 15.0
Row = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Case:
  """A model of a side, with an allocator."""

  side: str
  allocator: str
  model: str  # as the worker calls it
  flops: float  # of a step
  worker: Worker
  first: Row = dataclasses.field(default_factory=dict)
  seconds: list[float] = dataclasses.field(default_factory=list)  # of a step
  of_matmul: list[float] = dataclasses.field(default_factory=list)
  loss: float = 0.0

  @property
  def first_step_s(self) -> float:
    """With what it takes to compile the step, not to make the state."""
    return self.first["seconds"] + self.first.get("compile_s", 0.0)

  @property
  def rates(self) -> list[float]:
    """Tokens a second."""
    return [shape.BATCH * shape.TOKENS / seconds for seconds in self.seconds]


def _command(python: str, module: str, *arguments: str) -> list[str]:
  return [python, "-m", f"benchmarks.step_workers.{module}", *arguments]


def _sides() -> Iterator[tuple[str, str, list[str], list[str]]]:
  """Side, allocator, models, and the command of its worker."""
  ours = _command(sys.executable, "aquila")
  torch = _command(
    _TORCH_PYTHON.value, "hugging_face", f"--threads={_THREADS.value}"
  )
  models = ["dropless", "capacity", "dense"]
  for allocator in _ALLOCATORS:
    yield "aquila_jax", allocator, models, ours
    yield "transformers", allocator, ["mixtral", "dense"], torch
    if _MAXTEXT_PYTHON.value:
      maxtext = _command(_MAXTEXT_PYTHON.value, "maxtext_step")
      yield "MaxText", allocator, ["mixtral"], maxtext
  kept = [*ours, "--keep_freed_memory"]
  yield "aquila_jax", "keep_freed_memory", models, kept


def _environment(allocator: str) -> dict[str, str]:
  root = str(pathlib.Path(__file__).resolve().parent.parent)
  return {
    "PYTHONPATH": root,
    "JAX_PLATFORMS": "cpu",
    # Of MaxText: without the packages of its cloud.
    "DECOUPLE_GCLOUD": "TRUE",
    **_ALLOCATORS.get(allocator, {}),
  }


def _flops(model: str) -> float:
  """Of a step, whoever takes it."""
  config = aquila.model("dense" if model == "dense" else "dropless")
  tokens = shape.BATCH * shape.TOKENS
  return tokens * counting.train_flops_per_token(
    config, sequence_length=shape.TOKENS
  )


def _cases() -> list[Case]:
  """Every worker, and what it has to do."""
  cases = []
  for side, allocator, models, command in _sides():
    worker = Worker(command, environment=_environment(allocator))
    cases += [
      Case(
        side=side,
        allocator=allocator,
        model=model,
        flops=_flops(model),
        worker=worker,
      )
      for model in models
    ]
  # The models beside each other, since they are compared.
  return sorted(cases, key=lambda case: case.model == "dense")


def _matmul_workers() -> list[Worker]:
  environment = _environment("tuned")
  commands = [
    _command(sys.executable, "matmul", "--framework=jax"),
    _command(
      _TORCH_PYTHON.value,
      "matmul",
      "--framework=torch",
      f"--threads={_THREADS.value}",
    ),
  ]
  return [Worker(command, environment=environment) for command in commands]


def _matmul_rate(workers: list[Worker]) -> float:
  """FLOPs a second of the best product, now."""
  rates = []
  for worker in workers:
    for m, k, n in matmul.SHAPES:
      seconds = worker.run(matmul.name(m, k, n), steps=1)["seconds"]
      rates.append(2.0 * m * k * n / seconds)
  return max(rates)


def measure(cases: list[Case], products: list[Worker]) -> list[float]:
  """Fills the cases; answers with the matmul rates in between."""
  for worker in products:
    for sizes in matmul.SHAPES:
      worker.start(matmul.name(*sizes))
  for case in cases:
    case.first = case.worker.start(case.model)
    case.worker.run(case.model, steps=1)
    print(
      f"{case.side} {case.model}, {case.allocator}: first step"
      f" {case.first_step_s:.1f} s",
      flush=True,
    )
  ceilings = []
  for i in range(_ROUNDS.value):
    print(f"round {i + 1} of {_ROUNDS.value}", flush=True)
    before = _matmul_rate(products)
    ceilings.append(before)
    for case in cases:
      # While a process waits its memory cools; training does not wait.
      case.worker.run(case.model, steps=1)
      said = case.worker.run(case.model, steps=_STEPS.value)
      seconds = said["seconds"] / _STEPS.value
      after = _matmul_rate(products)
      case.seconds.append(seconds)
      case.of_matmul.append(case.flops / seconds / max(before, after))
      case.loss = said["last"]
      ceilings.append(after)
      before = after
  return ceilings


def _best(cases: list[Case], side: str, models: tuple[str, ...]) -> Case | None:
  """Of a side's allocators the fastest."""
  found = [case for case in cases if case.side == side and case.model in models]
  return min(
    found, key=lambda case: statistics.median(case.seconds), default=None
  )


def _comparisons(cases: list[Case]) -> list[Row]:
  """Ours over each peer's rate, both at their best, round by round."""
  rows = []
  for model in ("dropless", "capacity", "dense"):
    ours = _best(cases, "aquila_jax", (model,))
    peers = ("dense",) if model == "dense" else ("mixtral",)
    for side, bar in _BARS.items():
      theirs = _best(cases, side, peers)
      if ours is None or theirs is None:
        continue
      ratios = [
        b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)
      ]
      rows.append(
        dict(
          model=model,
          peer=side,
          allocators=[ours.allocator, theirs.allocator],
          ratio=_rounded(statistics.median(ratios)),
          ratio_range=_range(ratios),
          bar=bar if model == "dropless" else None,
        )
      )
  return rows


def _rounded(value: float) -> float:
  return float(f"{value:.3g}")


def _range(values: list[float]) -> list[float]:
  return [_rounded(min(values)), _rounded(max(values))]


def _result(case: Case) -> Row:
  return dict(
    side=case.side,
    model=case.model,
    allocator=case.allocator,
    parameters=case.first["parameters"],
    step_ms=_rounded(1e3 * statistics.median(case.seconds)),
    tokens_s=_rounded(statistics.median(case.rates)),
    tokens_s_range=_range(case.rates),
    of_matmul=_rounded(statistics.median(case.of_matmul)),
    of_matmul_range=_range(case.of_matmul),
    first_step_s=_rounded(case.first_step_s),
    loss_first=_rounded(case.first["last"]),
    loss_last=_rounded(case.loss),
  )


def _report(cases: list[Case], ceilings: list[float]) -> Row:
  return dict(
    benchmark="train_step_cpu",
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    device=device(),
    versions={case.side: case.first["versions"] for case in cases}
    | dict(python=platform.python_version()),
    threads=_THREADS.value,
    rounds=_ROUNDS.value,
    steps=_STEPS.value,
    flops_a_step={model: _flops(model) for model in ("mixtral", "dense")},
    matmul_gflops=_rounded(statistics.median(ceilings) / 1e9),
    matmul_gflops_range=_range([rate / 1e9 for rate in ceilings]),
    results=[_result(case) for case in cases],
    comparisons=_comparisons(cases),
    first_step_bar_s=_FIRST_STEP_BAR_S,
  )


def _table(report: Row) -> str:
  low, high = report["matmul_gflops_range"]
  lines = [
    f"{report['device']}; matmul {report['matmul_gflops']:g} GFLOP/s"
    f" ({low:g} to {high:g})",
    f"{'side':<14}{'model':<10}{'allocator':<19}{'tokens/s':>9}{'range':>16}"
    f"{'of matmul':>11}{'first step':>12}  loss",
  ]
  for row in report["results"]:
    low, high = row["tokens_s_range"]
    lines.append(
      f"{row['side']:<14}{row['model']:<10}{row['allocator']:<19}"
      f"{row['tokens_s']:>9.4g}{f'{low:.4g} to {high:.4g}':>16}"
      f"{row['of_matmul']:>11.1%}{row['first_step_s']:>10.1f} s"
      f"  {row['loss_first']:g} -> {row['loss_last']:g}"
    )
  for row in report["comparisons"]:
    low, high = row["ratio_range"]
    bar = "" if row["bar"] is None else f"; bar {row['bar']:g}"
    lines.append(
      f"ours, {row['model']} ({row['allocators'][0]}) / {row['peer']}"
      f" ({row['allocators'][1]}): {row['ratio']:.2f}"
      f" ({low:.2f} to {high:.2f}{bar})"
    )
  lines.append(f"first step of ours: bar {report['first_step_bar_s']:g} s")
  return "\n".join(lines)


def _check_python() -> None:
  """Raises where torch's side cannot run."""
  if _TORCH_PYTHON.value != sys.executable:
    return
  missing = [
    name
    for name in ("torch", "transformers")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise SystemExit(
      f"train_step_cpu: {' and '.join(missing)} must be installed, or a Python"
      " that has them be named by --torch_python"
    )


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  _check_python()
  if not _MAXTEXT_PYTHON.value:
    print("MaxText is left out: --maxtext_python names no Python that has it")
  cases, products = _cases(), _matmul_workers()
  try:
    ceilings = measure(cases, products)
  finally:
    for worker in (*products, *(case.worker for case in cases)):
      worker.close()
  report = _report(cases, ceilings)
  print(_table(report))
  if _OUTPUT.value:
    text = json.dumps(report, indent=2) + "\n"
    pathlib.Path(_OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
