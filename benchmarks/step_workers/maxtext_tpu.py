"""MaxText's training step through the TPU's compiler, for train_step_tpu.

  python -m benchmarks.step_workers.maxtext_tpu FOLDER TOPOLOGY STEPS SETTING...

runs its own `train_compile` under MaxText's Python, with a libtpu, and leaves
in FOLDER what the compiler made: program.txt, and its memory, its kernels'
cycles and where its devices are on the torus in report.json. Grids that the
program sizes make STEPS steps.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import jax

from aquila_jax.planning.tpu_schedule import Clock


def main(folder: str, topology: str, steps: str, *settings: str) -> None:
  """Compiles and writes."""
  os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
  clock = Clock(topology)
  compiler: Any = importlib.import_module(
    "maxtext.trainers.pre_train.train_compile"
  )
  package: Any = importlib.import_module("maxtext")
  base = os.path.join(os.path.dirname(package.__file__), "configs", "base.yml")
  compile_step, found = compiler.jit_and_compile, []

  def keep(*arguments, **options):
    found.append(compile_step(*arguments, **options))
    return found[0]

  compiler.jit_and_compile = keep
  with clock.recording() as kernels:
    compiler.main(["", base, *settings])
  out, (compiled,) = pathlib.Path(folder), found
  (out / "program.txt").write_text(compiled.as_text(), encoding="utf-8")
  memory = compiled.memory_analysis()
  sharding: Any = jax.tree.leaves(compiled.input_shardings)[0]
  report = dict(
    coordinates=[device.coords for device in sharding.mesh.devices.flat],
    kernel_cycles={k.name: k.cycles_of(int(steps)) for k in kernels},
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    versions={
      name: importlib.metadata.version(name)
      for name in ("maxtext", "jax", "libtpu")
    },
  )
  (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
  main(*sys.argv[1:])
