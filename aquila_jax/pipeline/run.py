"""EfficientScale as a list: every stage in order, then the report.

WORKDIR/
  lock             while a process runs in it
  config.json      the resolved config
  data/            prepared text, unless the config names some
  stages/NAME/     what stage.py says
  report.html, summary.json
"""

from __future__ import annotations

import dataclasses

from etils import epath

from aquila_jax.core import disk, errors, processes
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.evaluation.results import ReportInput
from aquila_jax.pipeline import records
from aquila_jax.pipeline.context import (
  Context,
  Say,
  make_context,
  make_workdir,
)
from aquila_jax.pipeline.evaluate import evaluate_stage
from aquila_jax.pipeline.initial import Start
from aquila_jax.pipeline.preflight import (
  check_config,
  check_data,
  check_order,
)
from aquila_jax.pipeline.replaying import check_step, replay_step
from aquila_jax.pipeline.reporting import make_report
from aquila_jax.pipeline.stage import check_unchanged, is_done, run_stage
from aquila_jax.pipeline.workdir_lock import locked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
  """A pipeline that has run to its end."""

  report: ReportInput
  report_path: epath.Path
  did_nothing: bool  # all of it had been done before


def replay_in_pipeline(
  experiment: ExperimentConfig,
  workdir: epath.Path,
  *,
  stage: str,
  step: int,
  say: Say,
) -> str:
  """Takes a step of a stage again; see replaying.py.

  Args:
    experiment: of the workdir.
    workdir: of the experiment.
    stage: of its pipeline.
    step: which, from 1.
    say: takes a line for the person at the terminal.

  Returns:
    The page.

  Raises:
    errors.UserError: where there is no such stage or step.
  """
  directories = _directories(experiment, workdir)
  if stage not in directories:
    raise errors.unknown_name("--stage", stage, directories)
  if not directories[stage].is_dir():
    raise errors.UserError(f"--workdir={workdir}: {stage} has not begun in it")
  check_step(experiment, stage, step)
  with locked(workdir):
    context = make_context(experiment, workdir, say=say)
    start = _start(context, stage, directories)
    return replay_step(start, directories[stage], step)


def run_pipeline(
  experiment: ExperimentConfig, workdir: epath.Path, *, say: Say
) -> Finished | None:
  """Runs what is left to do of a pipeline.

  Args:
    experiment: data, stages and their order.
    workdir: of the experiment; made if missing.
    say: takes a line for the person at the terminal.

  Returns:
    The report; None in other processes than the first.

  Raises:
    errors.UserError: on a config that does not fit, found before the first
      step wherever it can be; where another process runs in the workdir; where
      a stage has checkpoints and none is whole.
    errors.TrainingStopped: on a loss that is not finite.
    errors.DiskFull: naming what could not be written.
    Interrupted: after SIGTERM or SIGINT, when the step is saved.
  """
  directories = _directories(experiment, workdir)
  check_order(experiment)
  check_config(experiment, stages=_to_do(directories))
  make_workdir(workdir)
  with disk.naming(workdir), locked(workdir):
    return _run(experiment, workdir, directories, say=say)


def _directories(
  experiment: ExperimentConfig, workdir: epath.Path
) -> dict[str, epath.Path]:
  return {name: workdir / "stages" / name for name in experiment.pipeline}


def _start(
  context: Context, name: str, directories: dict[str, epath.Path]
) -> Start:
  def locate(source: str) -> str:
    if source in directories:
      return str(directories[source] / "model")
    return source

  return Start(
    context=context,
    name=name,
    stage=context.experiment.stages[name],
    locate=locate,
  )


def _to_do(directories: dict[str, epath.Path]) -> list[str]:
  return [name for name, path in directories.items() if not is_done(path)]


def _run(
  experiment: ExperimentConfig,
  workdir: epath.Path,
  directories: dict[str, epath.Path],
  *,
  say: Say,
) -> Finished | None:
  to_do = _to_do(directories)
  context = make_context(experiment, workdir, say=say)
  starts = {name: _start(context, name, directories) for name in directories}
  for name, directory in directories.items():
    check_unchanged(starts[name], directory)
  check_data(context, stages=to_do)
  records.write(workdir / "config.json", records.plain(experiment))
  for number, (name, directory) in enumerate(directories.items(), start=1):
    if not is_done(directory):
      say(f"stage {number} of {len(directories)}: {name}")
    with disk.naming(directory):
      run_stage(starts[name], directory)
      evaluate_stage(context, name, directory)
  if not processes.is_first():
    return None
  report, path = make_report(context, workdir, directories)
  return Finished(report=report, report_path=path, did_nothing=not to_do)
