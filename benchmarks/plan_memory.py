"""Claim: what `plan memory` says in a second is what the TPU compiler assigns.

  PYTHONPATH=. PYTHON -m benchmarks.plan_memory --tpu_python=PYTHON

prints estimate and compiler by case, and the error. PYTHON has libtpu; no TPU
is needed. The compiler says what it assigns before it generates code, which
takes minutes, so that is not waited for. Without --tpu_python the numbers of
the compiler are those of the file, and only the estimates are made again.

Bytes are of HBM, arguments among them: what the compiler refuses a program by.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import tempfile
import time
from typing import Any

from absl import app, flags

from aquila_jax.cli import config_door
from aquila_jax.pipeline.planned import plan_memory
from aquila_jax.planning.pods import Pod
from aquila_jax.planning.tpu_schedule import REPORT, total_bytes
from benchmarks import gpu_clock

_OUTPUT = flags.DEFINE_string(
  "output", "benchmarks/results/plan_memory.json", "A JSON file to write."
)
_TPU_PYTHON = flags.DEFINE_string(
  "tpu_python", "", "A Python with libtpu; without it, the file's numbers."
)
_ONLY = flags.DEFINE_multi_string(
  "only", [], "Parts of names of the cases to compile again."
)
# Seconds for the compiler to come to memory; it takes 10 to 60.
_LIMIT = 600.0
_AFTERWARDS = "*.after_optimizations_after_buffer_assignment.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A stage on a pod."""

  name: str
  config: str  # of experiments/configs, which has one stage of that name
  topology: str
  mesh: dict[str, int]
  fields: dict[str, Any]  # of the stage

  @property
  def overrides(self) -> list[tuple[str, str]]:
    """As config_door.load_file takes them."""
    mesh = dict(data=1, fsdp=1, expert=1, tensor=1) | self.mesh
    return [
      *((f"mesh.{axis}", str(size)) for axis, size in mesh.items()),
      *(
        (f"stages.{self.config}.{path}", str(value))
        for path, value in self.fields.items()
      ),
    ]

  @property
  def flags(self) -> list[str]:
    """Of `plan compile`."""
    return [
      f"--config=experiments/configs/{self.config}.py",
      f"--topology={self.topology}",
      *(f"--config.{path}={value}" for path, value in self.overrides),
    ]


_SMALL = {
  "model.vocab_size": 32000,
  "model.num_layers": 8,
  "model.embed_dim": 1024,
  "model.mlp_dim": 2816,
  "model.num_heads": 8,
  "model.num_kv_heads": 4,
}


def _small(name: str, config: str, topology: str, mesh, **fields) -> Case:
  return Case(
    name=f"small {name}",
    config=config,
    topology=topology,
    mesh=mesh,
    fields=_SMALL | _dotted(fields),
  )


def _dotted(fields: dict[str, Any]) -> dict[str, Any]:
  return {name.replace("__", "."): value for name, value in fields.items()}


def _large(name: str, config: str, topology: str, mesh, **fields) -> Case:
  return Case(
    name=name,
    config=config,
    topology=topology,
    mesh=mesh,
    fields=_dotted(fields),
  )


def _aquila(topology: str, microbatches: int, **mesh: int) -> Case:
  sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
  return _large(
    f"8x16b, {topology}, {sizes}, {microbatches} parts",
    "aquila_8x16b",
    topology,
    mesh,
    train__num_microbatches=microbatches,
    train__loss__balance_over="running",
  )


def cases() -> list[Case]:
  """Dense and mixtures, small and as published, laid out in all ways."""
  dense, mixture = "aquila_1_8b", "aquila_8x1_8b"
  batch, parts = "train__batch_size", "train__num_microbatches"
  full = {"model__remat": "full"}
  return [
    _small("dense", dense, "v5e:4x4", dict(fsdp=16), **{batch: 64}, **full),
    _small(
      "dense, dots",
      dense,
      "v5e:4x4",
      dict(fsdp=16),
      **{batch: 64},
      model__remat="dots",
    ),
    _small(
      "dense, no remat",
      dense,
      "v5e:4x4",
      dict(fsdp=16),
      **{batch: 64},
      model__remat="none",
    ),
    _small("dense, data", dense, "v5e:2x2", dict(data=4), **{batch: 16}),
    _small(
      "dense, tensor, 4 parts",
      dense,
      "v5p:2x2x2",
      dict(fsdp=4, tensor=2),
      **{batch: 128, parts: 4},
    ),
    _small("mixture", mixture, "v5e:4x4", dict(fsdp=16), **{batch: 64}),
    _small(
      "mixture, dots",
      mixture,
      "v5e:4x4",
      dict(fsdp=16),
      **{batch: 64},
      model__remat="dots",
    ),
    _small(
      "mixture, no remat",
      mixture,
      "v5e:4x4",
      dict(fsdp=16),
      **{batch: 32},
      model__remat="none",
    ),
    _small(
      "mixture, capacity 1.25",
      mixture,
      "v6e:4x4",
      dict(fsdp=16),
      **{batch: 64},
      model__moe__capacity_factor=1.25,
    ),
    _small(
      "mixture, tensor",
      mixture,
      "v5p:2x2x4",
      dict(fsdp=8, tensor=2),
      **{batch: 64},
    ),
    _small(
      "mixture, 4 of experts, 4 parts",
      mixture,
      "v5p:2x2x4",
      dict(fsdp=4, expert=4),
      **{batch: 256, parts: 4},
    ),
    _small(
      "mixture, 8 of experts",
      mixture,
      "v6e:4x4",
      dict(fsdp=2, expert=8),
      **{batch: 64},
    ),
    _large(
      "1.8b, long batch, 2 parts",
      dense,
      "v5e:4x4",
      dict(fsdp=16),
      **{batch: 128, parts: 2},
    ),
    _large("8x1.8b", mixture, "v5p:2x2x4", dict(fsdp=16), **{batch: 64}),
    _large(
      "16b, v5p:4x8x8, data 2 x fsdp 128, 3 parts",
      "aquila_16b",
      "v5p:4x8x8",
      dict(data=2, fsdp=128),
      **{parts: 3},
    ),
    _aquila("v5p:4x4x8", 12, fsdp=128),
    _aquila("v5p:4x8x8", 6, fsdp=256),
    _aquila("v5p:8x8x8", 3, data=4, fsdp=128),
    _aquila("v6e:16x16", 6, fsdp=64, expert=4),
    _aquila("v6e:16x16", 6, fsdp=256),
    _aquila("v6e:16x16", 8, fsdp=32, expert=8),
  ]


def compiled_bytes(case: Case, python: str) -> int | None:
  """What the compiler assigns; None where it ends without saying it."""
  with tempfile.TemporaryDirectory() as name:
    command = [python, "-m", "aquila_jax.cli.plan", "compile", *case.flags]
    with subprocess.Popen(
      command,
      # Where it puts what it reads of the compiler.
      env=os.environ | {"TMPDIR": name, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    ) as process:
      started = time.monotonic()
      while process.poll() is None:
        # It is written after the report.
        if list(pathlib.Path(name).rglob(_AFTERWARDS)):
          break
        if time.monotonic() - started > _LIMIT:
          process.kill()
          raise TimeoutError(case.name)
        time.sleep(0.2)
      # Before it removes its files.
      reports = pathlib.Path(name).rglob(REPORT)
      totals = [total_bytes(report.parent) for report in reports]
      process.kill()
  return totals[0] if totals else None


def estimated(case: Case) -> dict[str, Any]:
  """By arithmetic."""
  path = f"experiments/configs/{case.config}.py"
  experiment = config_door.load_file(path, case.overrides)
  started = time.perf_counter()
  plan = plan_memory(experiment, case.config, Pod.of(case.topology))
  seconds = time.perf_counter() - started
  return dict(
    estimate=plan.memory.total,
    state=plan.state.parameters + plan.state.optimizer + plan.state.batch,
    temporaries=dataclasses.asdict(plan.temporaries),
    hbm=plan.pod.hbm,
    seconds=seconds,
  )


def _line(row: dict[str, Any]) -> str:
  return (
    f"{row['case']:<46}{row['estimate'] / 2**30:>9.2f}"
    f"{row['compiler'] / 2**30:>10.2f}{row['error']:>8.1%}"
  )


def main(argv: list[str]) -> None:
  """Compiles, estimates, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  file = pathlib.Path(_OUTPUT.value)
  known = {}
  if file.exists():
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    known = {row["case"]: row["compiler"] for row in rows}
  print(f"{'GiB of a device':<46}{'estimate':>9}{'compiler':>10}{'error':>8}")
  rows = []
  for case in cases():
    is_wanted = not _ONLY.value or any(one in case.name for one in _ONLY.value)
    if _TPU_PYTHON.value and (is_wanted or case.name not in known):
      known[case.name] = compiled_bytes(case, _TPU_PYTHON.value)
    compiler = known.get(case.name)
    if compiler is None:
      raise app.UsageError(f"{case.name}: not compiled; give --tpu_python")
    row = dict(case=case.name, flags=case.flags, compiler=compiler)
    row |= estimated(case)
    row["error"] = row["estimate"] / compiler - 1
    rows.append(row)
    print(_line(row), flush=True)
    gpu_clock.write_report(
      _OUTPUT.value,
      benchmark="plan_memory",
      within_a_tenth=sum(abs(row["error"]) <= 0.1 for row in rows),
      rows=rows,
    )


if __name__ == "__main__":
  app.run(main)
