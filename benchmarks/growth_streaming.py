r"""Claim: growth from disk to disk runs near the rate of writing to the disk.

  python -m benchmarks.growth_streaming --folder=DIR [--layers=32]
  python -m benchmarks.growth_streaming --folder=DIR --layers=4 \
    --method=sparse_upcycling

Writes a model in random bfloat16, grows it by the verb's own function, of
Scale-Up aquila_7b (16.4 GB) to aquila_16b (33.3 GB), of Scale-Out aquila_16b
(33.3 GB) to aquila_8x16b (209 GB), and, over and over,

  grow    the growth, from the first byte read to the last one synced
  write   the same leaves, slices and codec from buffers that are there
  raw     one file of as many bytes, written and synced

and gives the first as a share of the second. Each part is a process of its own,
for its peak of resident memory. With `--layers` the source has fewer (of
Scale-Up a multiple of 4) and all else is as it is: the slices are as large, and
a few of them are all that is in memory. What was written is removed.

Where the source fits into the page cache it may be read from there, as it would
be right after it was written.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, get_args

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from etils import epath

from aquila_jax.cli import config_door
from aquila_jax.core import model_dir
from aquila_jax.core.allocator import keep_freed_memory
from aquila_jax.core.experiment_config import (
  ScaleOut,
  ScaleUp,
  UpcyclingMethod,
)
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.growth.calibration import calibrate
from aquila_jax.growth.checking import ReadModel
from aquila_jax.growth.grown_tree import slice_shape, slices
from aquila_jax.growth.scale_out import plan_scale_out
from aquila_jax.growth.scale_up import model_leaves
from aquila_jax.growth.streaming import stream_scale_out, stream_scale_up
from aquila_jax.models import decoder_lm
from benchmarks.machine import device

_FOLDER = flags.DEFINE_string(
  "folder", None, "On the disk to measure; 50 GB must be free.", required=True
)
_LAYERS = flags.DEFINE_integer("layers", 32, "Of the source.", 1)
_METHOD = flags.DEFINE_string(
  "method", "aki_pro", "Of Scale-Up or of Scale-Out."
)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "How often each is measured.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_PART = flags.DEFINE_string("part", None, "Used by the benchmark itself.")

_PARTS = ("grow", "write", "raw")
_CONFIGS = pathlib.Path(__file__).parents[1] / "experiments" / "configs"


def _is_scale_out() -> bool:
  return _METHOD.value in get_args(UpcyclingMethod)


def _read(name: str, layers: int, factor: float = 1.0) -> ModelConfig:
  config = config_door.load_file(str(_CONFIGS / f"{name}.py"))
  model = config.stages[name].model
  return dataclasses.replace(
    model,
    num_layers=layers,
    param_dtype="bfloat16",
    norm_epsilon=model.norm_epsilon * factor,
  )


def _models() -> tuple[ModelConfig, ModelConfig]:
  layers = _LAYERS.value
  if _is_scale_out():
    return _read("aquila_16b", layers), _read("aquila_8x16b", layers)
  assert layers % 4 == 0
  factor = 1.0 if _METHOD.value != "lemon" else 4096 / 5120
  return _read("aquila_7b", layers), _read(
    "aquila_16b", layers * 5 // 4, factor
  )


def _num_bytes(config: ModelConfig) -> int:
  leaves = jax.tree.leaves(decoder_lm.abstract_params(config))
  return sum(int(np.prod(leaf.shape)) * 2 for leaf in leaves)


def _stored(config: ModelConfig) -> StoredModel:
  return StoredModel(
    config=config,
    lineage=Lineage(),
    params=decoder_lm.abstract_params(config),
    tokenizer=None,
  )


def _write(path: pathlib.Path, config: ModelConfig) -> float:
  """Writes a MODEL of random numbers; the seconds."""
  leaves, buffers = model_leaves(config), {}
  generator = np.random.default_rng(0)

  def buffer(shape: tuple[int, ...]) -> np.ndarray:
    # The same numbers in every layer: what they are changes no time.
    if shape not in buffers:
      drawn = 0.02 * generator.standard_normal(shape, np.float32)
      buffers[shape] = drawn.astype(ml_dtypes.bfloat16)
    return buffers[shape]

  places = [(name, i) for name, leaf in leaves.items() for i in slices(leaf)]
  axes = decoder_lm.parameter_axes(config)
  parts = [(n, i, slice_shape(leaves[n], i)) for n, i in places]
  for _, _, shape in parts:
    buffer(shape)
  started = time.perf_counter()
  with (
    model_dir.writing(path, _stored(config), axes=axes) as writer,
    ThreadPoolExecutor(2) as pool,
  ):
    pending: collections.deque[Any] = collections.deque()
    for name, index, shape in parts:
      if len(pending) == 2:
        pending.popleft().result()
      pending.append(
        pool.submit(writer.params.write, name, buffer(shape), index=index)
      )
    for future in pending:
      future.result()
  return time.perf_counter() - started


def _raw(path: pathlib.Path, size: int) -> float:
  """Writes one file of `size` bytes and syncs it; the seconds."""
  block = np.random.default_rng(0).bytes(64 * 2**20)
  started = time.perf_counter()
  with open(path, "wb", buffering=0) as file:
    for start in range(0, size, len(block)):
      file.write(memoryview(block)[: min(len(block), size - start)])
    os.fsync(file.fileno())
  return time.perf_counter() - started


def _run_part(part: str, folder: pathlib.Path) -> dict[str, Any]:
  """One part, in a process of its own."""
  source, target = _models()
  keep_freed_memory()  # as the verb does
  if part == "source":
    seconds = _write(folder / "source", source)
  elif part == "write":
    seconds = _write(folder / "target", target)
  elif part == "raw":
    seconds = _raw(folder / "raw", _num_bytes(target))
  else:
    reader = model_dir.open_model(
      folder / "source", like=decoder_lm.abstract_params
    )
    started = time.perf_counter()
    _grow(reader, folder / "target", target)
    seconds = time.perf_counter() - started
  used = resource.getrusage(resource.RUSAGE_SELF)
  return {
    "seconds": seconds,
    "peak_bytes": used.ru_maxrss * 1024,
    "cpu_seconds": {"user": used.ru_utime, "system": used.ru_stime},
  }


def _grow(
  source: model_dir.ModelReader, output: pathlib.Path, target: ModelConfig
) -> None:
  def say(line: str) -> None:
    del line

  if not _is_scale_out():
    up = ScaleUp(source="", method=_METHOD.value, optimizer="reset")
    stream_scale_up(source, output, target, up, progress=say)
    return
  method: Any = _METHOD.value
  out = ScaleOut(source="", method=method, optimizer="reset")
  plan = plan_scale_out(source.model.config, target, out)
  calibration = calibrate(
    plan.way,
    ReadModel(config=source.model.config, params=source.params),
    target,
    out,
    sample=None,
    seed=0,
    path="target",
  )
  stream_scale_out(
    [source], output, plan, out, calibration=calibration, progress=say
  )


def _start_part(part: str, folder: pathlib.Path) -> dict[str, Any]:
  arguments = [f"--{f.name}={f.value}" for f in (_FOLDER, _LAYERS, _METHOD)]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.growth_streaming", f"--part={part}"]
    + arguments,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  for name in ("target", "raw"):
    left = folder / name
    if left.is_dir():
      shutil.rmtree(left)
    elif left.exists():
      left.unlink()
  os.sync()
  return json.loads(done.stdout.splitlines()[-1])


def _cpu(one: dict[str, Any]) -> str:
  used = one["cpu_seconds"]
  return f"{used['user']:.0f} s + {used['system']:.0f} s of the system"


def main(argv: list[str]) -> None:
  del argv
  folder = pathlib.Path(epath.Path(_FOLDER.value).expanduser())
  if _PART.value:
    print(json.dumps(_run_part(_PART.value, folder)))
    return
  folder.mkdir(parents=True, exist_ok=True)
  source, target = _models()
  print(
    f"{_METHOD.value}: {_num_bytes(source) / 1e9:.1f} GB to"
    f" {_num_bytes(target) / 1e9:.1f} GB, {_ROUNDS.value} rounds"
  )
  rounds: dict[str, list[dict[str, Any]]] = {part: [] for part in _PARTS}
  try:
    _start_part("source", folder)
    for number in range(_ROUNDS.value):
      # In another order each time, as a disk may tire.
      for part in _PARTS if number % 2 == 0 else _PARTS[::-1]:
        rounds[part].append(_start_part(part, folder))
  finally:
    shutil.rmtree(folder / "source", ignore_errors=True)
  size = _num_bytes(target)
  rates = {
    part: [size / one["seconds"] / 1e9 for one in found]
    for part, found in rounds.items()
  }
  for part, values in rates.items():
    peak = max(one["peak_bytes"] for one in rounds[part]) / 2**30
    print(
      f"{part:6s} {statistics.median(values):6.3f} GB/s"
      f"  ({min(values):.3f} to {max(values):.3f})  peak {peak:.2f} GiB"
      f"  CPU {_cpu(rounds[part][0])}"
    )
  shares = [g / w for g, w in zip(rates["grow"], rates["write"], strict=True)]
  share = statistics.median(shares)
  print(f"growth runs at {share:.0%} of the rate of the same bytes' writing")
  if _OUTPUT.value:
    record = {
      "device": device(),
      "versions": {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "tensorstore": metadata.version("tensorstore"),
      },
      "date": datetime.date.today().isoformat(),
      "method": _METHOD.value,
      "layers": _LAYERS.value,
      "source_bytes": _num_bytes(source),
      "target_bytes": size,
      "rounds": rounds,
      "share_of_write": share,
    }
    pathlib.Path(_OUTPUT.value).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
