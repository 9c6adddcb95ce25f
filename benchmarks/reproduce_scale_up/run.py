"""The order of work: seed after seed, and then the checks.

In WORKDIR (benchmarks/reproduction/job.py), beside the stages of a seed:

  seed_N/initial.jsonl     the losses right after growth
"""

from __future__ import annotations

from aquila_jax.evaluation.results import ReportInput
from aquila_jax.pipeline.context import make_context
from benchmarks.reproduce_scale_up import collected, initial, page
from benchmarks.reproduction import job as job_lib
from benchmarks.reproduction.job import Job


def run(
  job: Job,
  *,
  checks: bool = True,
  rows: list[tuple[str, str]] | None = None,
) -> None:
  """Does what is left to do, in order.

  Args:
    job: what to do, and where.
    checks: whether to run the stages that are not in the pipeline, of the first
      seed.
    rows: size and method of the rows of initial losses; None is all of them.

  Raises:
    errors.UserError: as `run_pipeline`, and so the others.
    errors.TrainingStopped: on a loss that is not finite.
    Interrupted: after SIGTERM or SIGINT, when the step is saved.
  """
  job_lib.prepare_text(job)
  pipeline = job.experiment.pipeline

  def write(report: ReportInput, _: str) -> None:
    _write(job, report)

  for seed in job.seeds:
    job.say(f"seed {seed}")
    report = job_lib.run_stages(job, seed, ("source",))
    _initial_losses(job, seed, rows)
    _write(job, report)
    job_lib.run_arms(
      job, seed, before=("source",), arms=pipeline[1:], then=write
    )
  if checks:
    arms = sorted(set(job.experiment.stages) - set(pipeline))
    # Sources stand before what grows from them.
    arms.sort(key=lambda name: not name.startswith("source"))
    job.say(f"checks, of seed {job.seeds[0]}")
    job_lib.run_arms(job, job.seeds[0], before=pipeline, arms=arms, then=write)


def _initial_losses(
  job: Job, seed: int, rows: list[tuple[str, str]] | None
) -> None:
  experiment, directory = job.of_seed(seed), job.directory(seed)
  initial.measure(
    make_context(experiment, directory, say=job.say),
    arm=experiment.stages["fpi"],
    model=directory / "stages" / "source" / "model",
    output=directory / "initial.jsonl",
    rows=rows,
  )


def _write(job: Job, report: ReportInput) -> None:
  """The results so far, and their page."""
  found = collected.collect(job.experiment, job.directories)
  page.write(job_lib.write_results(job, report, found), job.page)
