"""The order of work that reproductions share: seeds, stages, results so far.

WORKDIR/
  data/               prepared text, of all seeds
  seed_N/             a workdir of efficient_scale
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.data.prepare import prepare
from aquila_jax.evaluation.results import ReportInput
from aquila_jax.pipeline.context import Say, say_on_stderr
from aquila_jax.pipeline.run import run_pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What is run, and where it is written."""

  experiment: ExperimentConfig  # `pipeline` is a source, and then the arms
  workdir: epath.Path
  seeds: tuple[int, ...]
  output: pathlib.Path
  page: pathlib.Path
  say: Say = say_on_stderr

  def of_seed(self, seed: int) -> ExperimentConfig:
    """The experiment of a seed; the text is the same for all."""
    data = dataclasses.replace(
      self.experiment.data, seed=seed, prepared=str(self.workdir / "data")
    )
    return dataclasses.replace(self.experiment, seed=seed, data=data)

  def directory(self, seed: int) -> epath.Path:
    return self.workdir / f"seed_{seed}"

  @property
  def directories(self) -> dict[int, epath.Path]:
    """Of each seed."""
    return {seed: self.directory(seed) for seed in self.seeds}


def prepare_text(job: Job) -> None:
  """Prepares the text of all seeds, unless that is done."""
  prepare(
    job.experiment.data, pathlib.Path(job.workdir / "data"), progress=job.say
  )


def run_stages(job: Job, seed: int, stages: tuple[str, ...]) -> ReportInput:
  """Runs what is left to do of some stages of a seed."""
  experiment = dataclasses.replace(job.of_seed(seed), pipeline=stages)
  finished = run_pipeline(experiment, job.directory(seed), say=job.say)
  assert finished is not None, "of several processes, another one reports"
  return finished.report


def run_arms(
  job: Job,
  seed: int,
  *,
  before: tuple[str, ...],
  arms: Sequence[str],
  then: Callable[[ReportInput, str], None],
) -> None:
  """Trains arm after arm.

  Args:
    job: see there.
    seed: of which.
    before: the stages that the arms come from.
    arms: in order.
    then: is called after each, with the report and the arm's name.
  """
  for number, arm in enumerate(arms, start=1):
    then(run_stages(job, seed, (*before, *arms[:number])), arm)


def write_results(
  job: Job, report: ReportInput, collected: Mapping[str, Any]
) -> dict[str, Any]:
  """Writes the results so far.

  Args:
    job: says where.
    report: of any of its stages, for machine and versions.
    collected: the numbers.

  Returns:
    What was written.
  """
  results = {
    "date": time.strftime("%Y-%m-%d"),
    "machine": {
      key: report.machine[key] for key in ("device", "CPU cores", "system")
    },
    "versions": report.versions,
    **collected,
  }
  job.output.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
  job.output.write_text(text, encoding="utf-8")
  return results
