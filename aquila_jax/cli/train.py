r"""Trains one stage of a config, from scratch or from a MODEL.

  python -m aquila_jax.cli.train --config=experiments/configs/smoke.py \
    --stage=dense --workdir=runs/dense [--init_from=MODEL]

WORKDIR takes the resolved config, checkpoints, metrics.jsonl, TensorBoard
events and, at the end, WORKDIR/model. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import dataclasses

from absl import flags
from etils import epath

from aquila_jax.cli import app, config_door, model_flags, process_flags
from aquila_jax.core import disk, errors, processes
from aquila_jax.core.allocator import keep_freed_memory
from aquila_jax.core.experiment_config import ExperimentConfig, Load
from aquila_jax.pipeline import budget, records
from aquila_jax.pipeline.context import (
  make_context,
  make_workdir,
  say_on_stderr,
)
from aquila_jax.pipeline.initial import Start
from aquila_jax.pipeline.preflight import check_config, check_data
from aquila_jax.pipeline.replaying import check_step, replay_step
from aquila_jax.pipeline.stage import check_unchanged, is_done, run_stage
from aquila_jax.pipeline.workdir_lock import locked
from aquila_jax.training.compilation import enable_compilation_cache
from aquila_jax.training.profiling import check_profile_steps

_CONFIG = config_door.define_flag()
_STAGE = model_flags.define_stage()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Takes everything that is written.", required=True
)
_INIT_FROM = flags.DEFINE_string(
  "init_from",
  "",
  "A MODEL of the stage's architecture to go on from, with its optimizer state"
  " where it has one; in place of the config's init.",
)
_PROFILE_STEPS = flags.DEFINE_list(
  "profile_steps",
  [],
  "START,STOP: profiles steps START <= step < STOP, counted from 0, into"
  " WORKDIR/profile.",
)
_EXPLAIN_SHARDING = model_flags.define_explain_sharding()
_REPLAY_STEP = model_flags.define_replay_step()
_SAVE_OPTIMIZER = flags.DEFINE_bool(
  "save_optimizer", True, "Whether the MODEL gets the optimizer state."
)


def main() -> None:
  keep_freed_memory()
  experiment = config_door.load(_CONFIG)
  name = model_flags.stage_name(experiment, _STAGE.value)
  others = (
    _STAGE,
    _INIT_FROM,
    _PROFILE_STEPS,
    _EXPLAIN_SHARDING,
    _REPLAY_STEP,
    _SAVE_OPTIMIZER,
  )
  workdir = process_flags.workdir(_WORKDIR)
  process_flags.join(experiment, others)
  if _EXPLAIN_SHARDING.value:
    if processes.is_first():
      print(model_flags.explain_sharding(experiment, [name]))
    return
  experiment = _with_init_from(experiment, name)
  profile_steps = _profile_steps()
  _check_source(experiment, name)
  enable_compilation_cache()
  if _REPLAY_STEP.value:
    check_step(experiment, name, _REPLAY_STEP.value)
  to_do = [] if is_done(workdir) else [name]
  check_config(experiment, stages=to_do)
  check_profile_steps(
    profile_steps,
    total_steps=budget.total_steps(experiment, name),
    name="--profile_steps",
  )
  if _REPLAY_STEP.value:
    _check_run(workdir)
  make_workdir(workdir)
  with disk.naming(workdir), locked(workdir):
    context = make_context(experiment, workdir, say=say_on_stderr)
    stage = experiment.stages[name]
    start = Start(context=context, name=name, stage=stage, locate=str)
    if _REPLAY_STEP.value:
      print(replay_step(start, workdir, _REPLAY_STEP.value))
      return
    check_unchanged(start, workdir)
    check_data(context, stages=to_do)
    records.write(workdir / "config.json", records.plain(experiment))
    run_stage(
      start,
      workdir,
      profile_steps=profile_steps,
      save_optimizer=_SAVE_OPTIMIZER.value,
    )
  if processes.is_first():
    print(f"MODEL: {workdir / 'model'}")


def _check_run(workdir: epath.Path) -> None:
  """Refuses to replay a step where there is no run.

  Raises:
    errors.UserError: in all processes.
  """
  if not processes.from_first(workdir.is_dir, name="workdir there"):
    raise errors.UserError(
      f"--workdir={str(workdir)!r}: there is no run; --replay_step takes a step"
      " of one again"
    )


def _with_init_from(
  experiment: ExperimentConfig, name: str
) -> ExperimentConfig:
  """The experiment whose stage `name` loads --init_from, if it is given."""
  if not _INIT_FROM.value:
    return experiment
  stage = experiment.stages[name]
  stage = dataclasses.replace(stage, init=Load(path=_INIT_FROM.value))
  return dataclasses.replace(
    experiment, stages={**experiment.stages, name: stage}
  )


def _check_source(experiment: ExperimentConfig, name: str) -> None:
  """Refuses a stage that grows from another stage of the pipeline.

  Raises:
    errors.UserError: saying what can be done instead.
  """
  parent = budget.parent_stage(experiment, name)
  if parent:
    raise errors.UserError(
      f"--stage={name}: it grows from the stage {parent!r}; give"
      " --init_from=MODEL with a model that scale_up or scale_out has grown, or"
      " run efficient_scale"
    )


def _profile_steps() -> tuple[int, int] | None:
  given = _PROFILE_STEPS.value
  if not given:
    return None
  try:
    first, last = map(int, given)
  except ValueError as error:
    raise errors.UserError(
      f"--profile_steps={','.join(given)}: expected two steps, as in 10,15"
    ) from error
  return first, last


if __name__ == "__main__":
  app.run(main)
