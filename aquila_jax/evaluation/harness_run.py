"""Tasks of lm-evaluation-harness on a MODEL, and the answers as plain data."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from aquila_jax import version
from aquila_jax.core import errors
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.evaluation import formats, harness, local_tasks
from aquila_jax.evaluation.tables import Table

_SOFTWARE = ("lm_eval", "jax", "jaxlib", "datasets", "tokenizers", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What is to be measured."""

  tasks: tuple[str, ...] = ()  # names, patterns such as mmlu_*, or .yaml files
  include_path: tuple[str, ...] = ()  # folders of task files
  num_fewshot: int | None = None  # None is what the task says
  limit: int | None = None  # items of a task; None is all
  batch_size: int = 32
  dtype: str = ""  # of the computation; "" is what the MODEL says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """One number of one task or group."""

  task: str
  name: str  # with the filter, where there is one
  value: float | None
  stderr: float | None
  items: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRun:
  """What the harness answered for one name of the request."""

  name: str
  metrics: tuple[Metric, ...]
  seconds: float
  record: dict[str, Any]  # of JSON: results, configs, versions, ...
  samples: list[dict[str, Any]]  # of JSON


def run(
  stored: StoredModel, request: Request, *, say: harness.Say
) -> list[TaskRun]:
  """Runs the tasks, one after the other.

  Args:
    stored: the MODEL.
    request: the tasks and their options.
    say: takes lines of progress.

  Returns:
    What became of each.

  Raises:
    errors.UserError: where lm_eval is missing, a task is unknown, or its data
      cannot be had.
  """
  lm_eval = quiet_lm_eval()
  manager = _manager(request.include_path, names=request.tasks)
  names = _matched(request.tasks, manager)
  model = harness.model_class()(
    model=stored, batch_size=request.batch_size, dtype=request.dtype, say=say
  )
  runs = []
  for name in names:
    say(f"{name}: reading the task")
    start = time.perf_counter()
    task = _load(name, manager)
    results = lm_eval.simple_evaluate(
      model=model,
      tasks=task,
      task_manager=manager,
      num_fewshot=request.num_fewshot,
      limit=request.limit,
    )
    seconds = time.perf_counter() - start
    say(f"{name}: {formats.duration(seconds)}")
    runs.append(_task_run(name, _plain(results), seconds=seconds))
  return runs


def task_names(include_path: Sequence[str] = ()) -> list[str]:
  """Names of all tasks, groups and tags: ours, the user's and the harness's."""
  quiet_lm_eval()
  return _manager(include_path).all_tasks


def table(runs: Sequence[TaskRun]) -> Table:
  """A row a number; the seconds of a task stand in its first."""
  rows = []
  for one in runs:
    previous = ""
    for i, metric in enumerate(one.metrics):
      rows.append(
        (
          "" if metric.task == previous else metric.task,
          metric.name,
          "" if metric.value is None else f"{metric.value:.4f}",
          "" if metric.stderr is None else f"{metric.stderr:.4f}",
          f"{metric.items:,}",
          f"{one.seconds:,.1f}" if i == 0 else "",
        )
      )
      previous = metric.task
  return Table(
    columns=("task", "metric", "value", "stderr", "items", "seconds"),
    rows=rows,
    words=("metric",),
  )


def to_json(request: Request, runs: Sequence[TaskRun]) -> dict[str, Any]:
  """Everything but the samples."""
  return {
    "options": dataclasses.asdict(request),
    "software": {
      "python": platform.python_version(),
      "aquila_jax": version.VERSION,
    }
    | {name: metadata.version(name) for name in _SOFTWARE},
    "tasks": {
      one.name: {
        "seconds": one.seconds,
        "metrics": [dataclasses.asdict(metric) for metric in one.metrics],
      }
      | one.record
      for one in runs
    },
  }


def quiet_lm_eval() -> Any:
  """The package, without its bars; warnings stay, but for one about nothing.

  Bars stay away where this is called before anything imports the package.

  Raises:
    errors.UserError: where it is not installed.
  """
  os.environ.setdefault("TQDM_DISABLE", "1")
  lm_eval = harness.import_lm_eval()
  lm_eval.utils.setup_logging(logging.WARNING)
  for handler in logging.getLogger("lm_eval").handlers:
    handler.addFilter(_is_for_people)
  return lm_eval


def _is_for_people(record: logging.LogRecord) -> bool:
  # Said of every task whose data come from a function, as ours.
  return "Custom kwargs can be passed" not in record.getMessage()


def _manager(
  include_path: Sequence[str], *, names: Sequence[str] | None = None
) -> Any:
  """The harness's index of tasks, without its own 10,000 where they may stay.

  They may where every name is a single task of another folder.
  """
  from lm_eval.tasks import (  # pyright: ignore[reportMissingImports]
    TaskManager,
  )

  folders = [str(local_tasks.FOLDER)]
  for given in include_path:
    path = pathlib.Path(given).expanduser()
    if not path.is_dir():
      raise errors.UserError(
        f"--include_path={given!r}: there is no such directory"
      )
    folders.append(str(path))
  if names is not None:
    manager = TaskManager(include_path=folders, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
      return manager
  return TaskManager(include_path=folders)


def _matched(names: Sequence[str], manager: Any) -> list[str]:
  """The names, patterns replaced by what they match."""
  known = manager.all_tasks
  matched: dict[str, None] = {}  # without repetitions, in order
  for name in names:
    if name.endswith(".yaml") and pathlib.Path(name).expanduser().is_file():
      found = [str(pathlib.Path(name).expanduser().resolve())]
    else:
      found = fnmatch.filter(known, name)
    if not found:
      near = errors.nearest(name, known)
      if near.startswith("valid: "):  # all of them
        near = f"--tasks=list shows the {len(known):,} names"
      raise errors.UserError(f"--tasks={name!r} is unknown; {near}")
    matched |= dict.fromkeys(found)
  return list(matched)


def _load(name: str, manager: Any) -> list[Any]:
  """The task objects of a name, with their data."""
  try:
    loaded = manager.load([name])
  except errors.UserError:
    raise
  # Hubs, files and a task's own code raise whatever they like.
  except Exception as error:
    reason = (str(error).splitlines() or [""])[0]
    raise errors.UserError(
      f"--tasks={name!r}: cannot be loaded: {type(error).__name__}: {reason}"
    ) from error
  groups = loaded.get("groups", {})
  inside = {member for group in groups.values() for member in group.child_names}
  return [group for key, group in groups.items() if key not in inside] + [
    task for key, task in loaded["tasks"].items() if key not in inside
  ]


def _plain(results: Any) -> dict[str, Any]:
  """As JSON: functions and arrays as text and numbers."""
  from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    handle_non_serializable,
  )

  text = json.dumps(
    results, default=handle_non_serializable, ensure_ascii=False
  )
  return json.loads(text)


def _task_run(name: str, results: dict[str, Any], *, seconds: float) -> TaskRun:
  metrics = []
  for section in ("groups", "results"):
    for task, found in results.get(section, {}).items():
      if section == "groups" or task not in results.get("groups", {}):
        metrics += _metrics(task, found)
  kept = ("results", "groups", "group_subtasks", "configs", "versions")
  kept += ("n-shot", "n-samples", "higher_is_better", "config")
  return TaskRun(
    name=name,
    metrics=tuple(metrics),
    seconds=seconds,
    record={key: results[key] for key in kept if key in results},
    samples=[
      {"task": task} | sample
      for task, samples in results.get("samples", {}).items()
      for sample in samples
    ],
  )


def _metrics(task: str, found: dict[str, Any]) -> list[Metric]:
  """The numbers of a task: `acc,none` and beside it `acc_stderr,none`."""
  metrics = []
  for key, value in found.items():
    name, comma, chosen = key.partition(",")
    if not comma or name.endswith("_stderr"):
      continue
    metrics.append(
      Metric(
        task=task,
        name=name if chosen == "none" else f"{name} ({chosen})",
        value=_number(value),
        stderr=_number(found.get(f"{name}_stderr,{chosen}")),
        items=int(found.get("sample_len") or 0),
      )
    )
  return metrics


def _number(value: Any) -> float | None:
  return float(value) if isinstance(value, int | float) else None
