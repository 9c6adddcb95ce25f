"""From the workdir of an experiment to its report."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
import time

import jax
from etils import epath

from aquila_jax import version
from aquila_jax.core import config as config_lib
from aquila_jax.core import errors, processes
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.core.lineage import Lineage
from aquila_jax.evaluation.report import write_report
from aquila_jax.evaluation.results import ReportInput, StageResult
from aquila_jax.pipeline import budget, records
from aquila_jax.pipeline.context import Context
from aquila_jax.pipeline.evaluate import read_evaluation
from aquila_jax.pipeline.stage import Opening
from aquila_jax.planning import counting
from aquila_jax.training.metrics import Row, read_rows

_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "tokenizers",
  "numpy",
)


def make_report(
  context: Context, workdir: epath.Path, directories: dict[str, epath.Path]
) -> tuple[ReportInput, epath.Path]:
  """Writes report.html and summary.json of what the stages left.

  Args:
    context: config and data.
    workdir: takes the two files.
    directories: of the stages, in order.

  Returns:
    What the report is made of, and the path of report.html.
  """
  experiment = context.experiment
  results: dict[str, StageResult] = {}
  for name, directory in directories.items():
    results[name] = _stage_result(experiment, name, directory, results)
  config = config_lib.to_dict(experiment)
  del config["stages"]
  report = ReportInput(
    name=experiment.name,
    stages=list(results.values()),
    split=experiment.evaluation.split,
    created=time.strftime("%Y-%m-%d %H:%M %Z"),
    config=config,
    versions=_versions(),
    machine=_machine(),
    dataset_card=context.data.card,
  )
  return report, write_report(workdir, report)


def _stage_result(
  experiment: ExperimentConfig,
  name: str,
  directory: epath.Path,
  earlier: dict[str, StageResult],
) -> StageResult:
  stage = experiment.stages[name]
  opening = Opening(**(records.read_here(directory / "stage.json") or {}))
  parent = budget.parent_stage(experiment, name)
  before = earlier.get(parent)
  total = counting.count(stage.model).total
  scores, samples = read_evaluation(directory)
  result = records.read_here(directory / "result.json") or {}
  return StageResult(
    name=name,
    kind=stage.init.kind,
    method=getattr(stage.init, "method", ""),
    parent=parent,
    is_control=bool(stage.train.match_flops),
    parameters=total.parameters,
    active_parameters=total.active,
    flops_per_token=budget.token_flops(stage),
    rows=_rows(directory / "metrics.jsonl"),
    validation=_rows(directory / "validation.jsonl"),
    flops_before=Lineage.from_json(opening.lineage).flops,
    wall_before_s=before.wall_before_s + before.wall_s if before else 0.0,
    spent_s=result.get("spent_s", {}),
    transform_losses=opening.transform_losses,
    evaluation=scores,
    samples=samples,
    config=config_lib.to_dict(stage),
  )


def _rows(path: epath.Path) -> list[Row]:
  """The rows of a stage that is done; it has written them.

  Raises:
    errors.UserError: where the file is lost: a report would say 0.
  """
  if not path.exists():
    raise errors.UserError(
      f"{path} is missing, so there is no report; delete {path.parent} to have"
      " the stage run again"
    )
  return read_rows(path)


def _versions() -> dict[str, str]:
  found = {"aquila_jax": version.VERSION, "python": platform.python_version()}
  return found | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _machine() -> dict[str, object]:
  devices = jax.devices()
  return {
    "platform": devices[0].platform,
    "device": _processor()
    if devices[0].platform == "cpu"
    else devices[0].device_kind,
    "devices": len(devices),
    "processes": processes.count(),
    "CPU cores": os.cpu_count(),
    "system": f"{platform.system()} {platform.machine()}",
    "peak memory of the process": f"{peak_memory_bytes() / 2**30:.2f} GiB",
  }


def peak_memory_bytes() -> int:
  """The largest resident set of this process so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
  """The name of the CPU where the system says it."""
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
      name, _, value = line.partition(":")
      if name.strip() == "model name":
        return value.strip()
  return platform.processor() or platform.machine()
