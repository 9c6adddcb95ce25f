"""The order of work: seed after seed, and then the checks.

WORKDIR/
  data/               prepared text, of all seeds
  seed_N/             a workdir of efficient_scale
    initial.jsonl     the losses right after growth
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence

from etils import epath

from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.data.prepare import prepare
from aquila_jax.evaluation.results import ReportInput
from aquila_jax.pipeline.context import Say, make_context, say_on_stderr
from aquila_jax.pipeline.run import run_pipeline
from benchmarks.reproduce_scale_up import collected, initial, page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What is run, and where it is written."""

  experiment: ExperimentConfig
  workdir: epath.Path
  seeds: tuple[int, ...]
  output: pathlib.Path
  page: pathlib.Path
  checks: bool = True
  # Size and method of the rows of initial losses; None is all of them.
  rows: list[tuple[str, str]] | None = None
  say: Say = say_on_stderr

  def of_seed(self, seed: int) -> ExperimentConfig:
    """The experiment of a seed; the text is the same for all."""
    data = dataclasses.replace(
      self.experiment.data, seed=seed, prepared=str(self.workdir / "data")
    )
    return dataclasses.replace(self.experiment, seed=seed, data=data)

  def directory(self, seed: int) -> epath.Path:
    return self.workdir / f"seed_{seed}"


def run(job: Job) -> None:
  """Does what is left to do, in order.

  Args:
    job: what to do, and where.

  Raises:
    errors.UserError: as `run_pipeline`, and so the others.
    errors.TrainingStopped: on a loss that is not finite.
    Interrupted: after SIGTERM or SIGINT, when the step is saved.
  """
  prepare(
    job.experiment.data, pathlib.Path(job.workdir / "data"), progress=job.say
  )
  arms = job.experiment.pipeline[1:]
  for seed in job.seeds:
    job.say(f"seed {seed}")
    report = _run_stages(job, seed, ("source",))
    _initial_losses(job, seed)
    _write(job, report)
    _run_arms(job, seed, ("source",), arms)
  if job.checks:
    checks = sorted(set(job.experiment.stages) - set(job.experiment.pipeline))
    # Sources stand before what grows from them.
    checks.sort(key=lambda name: not name.startswith("source"))
    job.say(f"checks, of seed {job.seeds[0]}")
    _run_arms(job, job.seeds[0], job.experiment.pipeline, checks)


def _run_arms(
  job: Job, seed: int, before: tuple[str, ...], arms: Sequence[str]
) -> None:
  """Trains arm after arm, and writes the results after each."""
  for number in range(1, len(arms) + 1):
    _write(job, _run_stages(job, seed, (*before, *arms[:number])))


def _run_stages(job: Job, seed: int, stages: tuple[str, ...]) -> ReportInput:
  experiment = dataclasses.replace(job.of_seed(seed), pipeline=stages)
  return run_pipeline(experiment, job.directory(seed), say=job.say).report


def _initial_losses(job: Job, seed: int) -> None:
  experiment, directory = job.of_seed(seed), job.directory(seed)
  initial.measure(
    make_context(experiment, directory, say=job.say),
    arm=experiment.stages["fpi"],
    model=directory / "stages" / "source" / "model",
    output=directory / "initial.jsonl",
    rows=job.rows,
  )


def _write(job: Job, report: ReportInput) -> None:
  """The results so far, and their page."""
  results = {
    "date": time.strftime("%Y-%m-%d"),
    "machine": {
      key: report.machine[key] for key in ("device", "CPU cores", "system")
    },
    "versions": report.versions,
    **collected.collect(
      job.experiment, {s: job.directory(s) for s in job.seeds}
    ),
  }
  job.output.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
  job.output.write_text(text, encoding="utf-8")
  page.write(results, job.page)
