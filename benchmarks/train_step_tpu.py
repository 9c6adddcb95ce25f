"""Claim: on a TPU pod a step of ours takes less time than one of MaxText's.

  PYTHONPATH=. PYTHON -m benchmarks.train_step_tpu --maxtext_python=PYTHON

needs libtpu and no TPU: programs for 64 chips of v5p are compiled, and what the
compiler says of them is added up (planning/tpu_program.py), by the same reader.
PYTHON is one that has MaxText, so that both sides are compiled by its jax and
libtpu; ours alone run with the extra `tpu`. Mixtral 8x7B, 4 rows of 4,096
tokens a chip, everything recomputed, bfloat16 compute on float32 parameters;
and ours alone of AquilaMoE-8x16B. Over an expert axis both move tokens; what
ours would do if a buffer did not suffice has its memory counted, not its time.

Time is a sum of estimates: once with nothing beside anything else, by which
`mfu` is, and once with all collectives beside all compute. Kernels whose grid
the program sizes make as many steps as these loads can need at most. Attention
counts as if its mask had skipped nothing, on both sides.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile
import time
from typing import Any

from absl import app, flags

from aquila_jax.core.experiment_config import OptimizerConfig, TrainConfig
from aquila_jax.pipeline.planned import lowered_step
from aquila_jax.planning.tpu_schedule import Clock
from aquila_jax.sharding.mesh import make_mesh
from benchmarks import gpu_clock
from benchmarks.pod_step import ROWS, TOKENS, Case, Row, cases, row_of, steps

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5p:4x4x4", "Of the pod.")
_ONLY = flags.DEFINE_multi_string(
  "only", [], "Parts of cases' names; rows of others stay in the file."
)
_MAXTEXT_PYTHON = flags.DEFINE_string(
  "maxtext_python", None, "A Python with MaxText and libtpu; without it, ours."
)


def _ours(case: Case, clock: Clock) -> Row:
  mesh = make_mesh(case.mesh, clock.devices)
  config = TrainConfig(
    batch_size=ROWS * len(clock.devices),
    sequence_length=TOKENS,
    steps=1000,
    optimizer=OptimizerConfig(learning_rate=1e-4),
  )
  device = clock.device
  _, lowered = lowered_step(
    case.model, config, mesh=mesh, total_steps=config.steps
  )
  started = time.perf_counter()
  schedule = clock.compile(lowered)
  compile_s = time.perf_counter() - started
  assert schedule.compiled is not None
  memory: Any = schedule.compiled.memory_analysis()
  return row_of(
    case,
    "ours",
    text=schedule.compiled.as_text() or "",
    kernel_cycles={
      kernel.name: kernel.cycles_of(steps(case.model))
      for kernel in schedule.kernels
    },
    memory=dict(
      arguments=memory.argument_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
    ),
    coordinates=[device.coords for device in mesh.devices.flat],
    device_kind=device.device_kind,
  ) | dict(compile_s=compile_s)


def _maxtext(case: Case, clock: Clock) -> Row:
  chips = len(clock.devices)
  settings = (
    "run_name=train_step_tpu",
    "model_name=mixtral-8x7b",
    f"compile_topology=v5p-{2 * chips}",  # they count cores
    "compile_topology_num_slices=1",
    f"per_device_batch_size={ROWS}",
    f"max_target_length={TOKENS}",
    "remat_policy=full",
    "dtype=bfloat16",
    "dataset_type=synthetic",
    "enable_checkpointing=false",
  )
  # A process has notes of its own.
  inherited = {
    name: value
    for name, value in os.environ.items()
    if name != "LIBTPU_INIT_ARGS"
  }
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
      [
        str(_MAXTEXT_PYTHON.value),
        "-m",
        "benchmarks.step_workers.maxtext_tpu",
        folder,
        _TOPOLOGY.value,
        str(steps(case.model)),
        *settings,
        f"base_output_directory={folder}",
        *case.maxtext,
      ],
      check=True,
      env=inherited | {"JAX_PLATFORMS": "cpu"},
    )
    out = pathlib.Path(folder)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return row_of(
      case,
      "MaxText",
      text=(out / "program.txt").read_text(encoding="utf-8"),
      kernel_cycles=report["kernel_cycles"],
      memory=report,
      coordinates=report["coordinates"],
      device_kind=clock.device.device_kind,
    ) | dict(versions=report["versions"])


_HEADER = (
  f"{'case':<42}{'side':<9}{'arguments':>10}{'temporaries':>12}"
  f"{'no overlap':>12}{'full':>8}{'links':>8}{'MFU':>7}"
)


def _line(row: Row) -> str:
  return (
    f"{row['case']:<42}{row['side']:<9}{row['arguments_gb']:>7.1f} GB"
    f"{row['temporaries_gb']:>9.1f} GB{row['seconds_without_overlap']:>10.2f} s"
    f"{row['seconds_with_full_overlap']:>6.2f} s{row['links_s']:>6.2f} s"
    f"{row['mfu']:>7.1%}"
  )


def _is_wanted(case: str) -> bool:
  return not _ONLY.value or any(part in case for part in _ONLY.value)


def _others() -> list[Row]:
  """Rows that the file has of cases that are not wanted."""
  if not _OUTPUT.value or not pathlib.Path(_OUTPUT.value).exists():
    return []
  text = pathlib.Path(_OUTPUT.value).read_text(encoding="utf-8")
  return [
    row for row in json.loads(text)["rows"] if not _is_wanted(row["case"])
  ]


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  clock = Clock(_TOPOLOGY.value)
  rows = _others()
  print(_HEADER, flush=True)
  for case in cases():
    if not _is_wanted(case.name):
      continue
    rows.append(_ours(case, clock))
    print(_line(rows[-1]), flush=True)
    if _MAXTEXT_PYTHON.value and case.maxtext:
      rows.append(_maxtext(case, clock))
      print(_line(rows[-1]), flush=True)
    gpu_clock.write_report(
      _OUTPUT.value,
      benchmark="train_step_tpu",
      topology=_TOPOLOGY.value,
      rows=rows,
    )


if __name__ == "__main__":
  app.run(main)
