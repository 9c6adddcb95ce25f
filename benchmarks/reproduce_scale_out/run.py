"""The order of work: seed after seed, and of each arm after arm.

In WORKDIR (benchmarks/reproduction/job.py), beside the stages of a seed:

  seed_N/experts.jsonl     how far experts differ, and their load (experts.py)
"""

from __future__ import annotations

from aquila_jax.evaluation.results import ReportInput
from benchmarks.reproduce_scale_out import collected, experts, page
from benchmarks.reproduction import job as job_lib
from benchmarks.reproduction.job import Job


def run(job: Job) -> None:
  """Does what is left to do, in order.

  Args:
    job: what to do, and where.

  Raises:
    errors.UserError: as `run_pipeline`.
    errors.TrainingStopped: on a loss that is not finite.
    Interrupted: after SIGTERM or SIGINT, when the step is saved.
  """
  job_lib.prepare_text(job)
  for seed in job.seeds:
    job.say(f"seed {seed}")
    _write(job, job_lib.run_stages(job, seed, ("source",)))
    _run_arms(job, seed)


def _run_arms(job: Job, seed: int) -> None:
  experiment, directory = job.of_seed(seed), job.directory(seed)

  def look(report: ReportInput, arm: str) -> None:
    experts.measure(experiment, directory, arm=arm, say=job.say)
    _write(job, report)

  arms = job.experiment.pipeline[1:]
  job_lib.run_arms(job, seed, before=("source",), arms=arms, then=look)


def _write(job: Job, report: ReportInput) -> None:
  """The results so far, and their page."""
  found = collected.collect(job.experiment, job.directories)
  page.write(job_lib.write_results(job, report, found), job.page)
