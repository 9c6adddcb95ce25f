"""Claim: tasks give what they give through transformers, and no slower.

  python -m benchmarks.harness_cpu --model=MODEL --gguf=FILE \
    --output=benchmarks/results/NAME.json

Runs tasks of lm-evaluation-harness twice, through its own class for
transformers and through ours, in turns: a block of items by the one, the same
block by the other. Whatever else the machine does so slows both. Compares
every answer, and the time that the answers took; ours has that of compiling
the programs in it, unless the cache has them, which `--warm` fills beforehand.

It needs the extra `eval`, torch, and for a GGUF file the package gguf. FILE may
also be a directory that transformers reads.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from aquila_jax.core import errors
from aquila_jax.evaluation import harness, harness_run, local_tasks
from aquila_jax.training.compilation import enable_compilation_cache

_MODEL: Any = flags.DEFINE_string("model", None, "A MODEL.", required=True)
_GGUF: Any = flags.DEFINE_string(
  "gguf", None, "The same, as transformers reads it.", required=True
)
_TASKS: Any = flags.DEFINE_list(
  "tasks", ["hellaswag_100", "truthfulqa_mc1_100"], "Names."
)
_LIMIT: Any = flags.DEFINE_integer("limit", 100, "Items of a task.", 1)
_BLOCKS: Any = flags.DEFINE_integer("blocks", 2, "Turns of a task.", 1)
_BATCH_SIZE: Any = flags.DEFINE_integer("batch_size", 8, "Of transformers.", 1)
_WARM: Any = flags.DEFINE_bool("warm", False, "A run of ours beforehand.")
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")

_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class Timer:
  """Seconds that a model of the harness spends on answers."""

  def __init__(self, model: Any):
    self.seconds = 0.0
    for kind in _KINDS:
      setattr(model, kind, self._timed(getattr(model, kind)))

  def _timed(self, method: Any) -> Any:
    def call(requests):
      start = time.perf_counter()
      answers = method(requests)
      self.seconds += time.perf_counter() - start
      return answers

    return call


def _transformers_model() -> Any:
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]
  from lm_eval.models.huggingface import (  # pyright: ignore[reportMissingImports]
    HFLM,
  )

  path = pathlib.Path(_GGUF.value).expanduser()
  options = {"gguf_file": path.name} if path.is_file() else {}
  folder = path.parent if path.is_file() else path
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, **options
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
  return HFLM(
    pretrained=model.eval(), tokenizer=tokenizer, batch_size=_BATCH_SIZE.value
  )


def _blocks(size: int) -> Iterator[list[int]]:
  step = -(-size // _BLOCKS.value)
  for start in range(0, size, step):
    yield list(range(start, min(start + step, size)))


def _run(model: Any, task: str, items: list[int]) -> list[dict[str, Any]]:
  lm_eval = harness.import_lm_eval()
  from lm_eval.tasks import (  # pyright: ignore[reportMissingImports]
    TaskManager,
  )

  manager = TaskManager(
    include_path=str(local_tasks.FOLDER), include_defaults=False
  )
  # What the tasks print is not ours.
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    results = lm_eval.simple_evaluate(
      model=model,
      tasks=[task],
      task_manager=manager,
      samples={task: items},
      bootstrap_iters=0,
    )
  return results["samples"][task]


def _compare(theirs: list[Any], ours: list[Any]) -> dict[str, Any]:
  """Numbers of both, the items that differ, and by how much answers do."""
  metrics: dict[str, Any] = {}
  largest, differing = 0.0, set()
  for one, other in zip(theirs, ours, strict=True):
    assert one["arguments"] == other["arguments"]
    for name in one["metrics"]:
      key = name if one["filter"] == "none" else f"{name} ({one['filter']})"
      entry = metrics.setdefault(key, {"transformers": [], "aquila": []})
      entry["transformers"].append(float(one[name]))
      entry["aquila"].append(float(other[name]))
      if one[name] != other[name]:
        differing.add((key, one["doc_id"]))
    for a, b in zip(one["resps"], other["resps"], strict=True):
      if isinstance(a[0], str):
        if a != b:
          differing.add(("text", one["doc_id"]))
        continue
      largest = max(largest, abs(a[0][0] - b[0][0]))
      if a[0][1] != b[0][1]:
        differing.add(("is_greedy", one["doc_id"]))
  return {
    "metrics": {
      name: {who: sum(v) / len(v) for who, v in entry.items()}
      for name, entry in metrics.items()
    },
    "differing_items": sorted(differing),
    "largest_difference_nats": largest,
  }


def _measure(task: str, models: dict[str, Any]) -> dict[str, Any]:
  timers = {name: Timer(model) for name, model in models.items()}
  samples: dict[str, list[Any]] = {name: [] for name in models}
  for items in _blocks(_LIMIT.value):
    for name, model in models.items():
      samples[name] += _run(model, task, items)
  seconds = {name: timer.seconds for name, timer in timers.items()}
  for model in models.values():
    for kind in _KINDS:
      delattr(model, kind)  # the method itself comes back
  found = _compare(samples["transformers"], samples["aquila"])
  return found | {
    "items": _LIMIT.value,
    "seconds": seconds,
    "time_ratio": seconds["aquila"] / seconds["transformers"],
  }


def _print(task: str, found: dict[str, Any]) -> None:
  seconds = found["seconds"]
  print(
    f"{task}: {found['items']} items, transformers"
    f" {seconds['transformers']:.1f} s, aquila {seconds['aquila']:.1f} s, ratio"
    f" {found['time_ratio']:.2f}"
  )
  for name, entry in found["metrics"].items():
    print(
      f"  {name}: transformers {entry['transformers']:.3f},"
      f" aquila {entry['aquila']:.3f}"
    )
  print(
    f"  largest difference {found['largest_difference_nats']:.1e} nats;"
    f" differing: {found['differing_items'] or 'none'}",
    flush=True,
  )


def main(argv: list[str]) -> None:
  del argv
  harness_run.quiet_lm_eval()
  enable_compilation_cache()
  ours = harness.model_class()(model=_MODEL.value)
  models = {"transformers": _transformers_model(), "aquila": ours}
  record = {
    "date": datetime.date.today().isoformat(),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("lm_eval", "torch", "transformers", "jax")
    },
    "warm": _WARM.value,
    "tasks": {},
  }
  for task in _TASKS.value:
    if _WARM.value:
      for items in _blocks(_LIMIT.value):
        _run(ours, task, items)
    found = _measure(task, models)
    _print(task, found)
    record["tasks"][task] = found
  if _OUTPUT.value:
    text = json.dumps(record, indent=2)
    pathlib.Path(_OUTPUT.value).write_text(text + "\n", encoding="utf-8")


def _main(argv: list[str]) -> None:
  try:
    main(argv)
  except errors.UserError as error:
    raise SystemExit(f"harness_cpu: {error}") from error


if __name__ == "__main__":
  app.run(_main)
