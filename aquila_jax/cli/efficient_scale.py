r"""Runs a whole experiment: every stage of its pipeline, then the report.

  python -m aquila_jax.cli.efficient_scale \
    --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Stopped at any instant and started again with the same command, it goes on from
its last checkpoint and repeats no finished stage.
"""

from __future__ import annotations

from absl import flags

from aquila_jax.cli import app, config_door, model_flags, process_flags
from aquila_jax.core import processes
from aquila_jax.core.allocator import keep_freed_memory
from aquila_jax.evaluation.summary import summary_table
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.pipeline.run import replay_in_pipeline, run_pipeline
from aquila_jax.training.compilation import enable_compilation_cache

_CONFIG = config_door.define_flag()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Takes everything that is written.", required=True
)
_STAGE = model_flags.define_stage()
_EXPLAIN_SHARDING = model_flags.define_explain_sharding()
_REPLAY_STEP = model_flags.define_replay_step()


def main() -> None:
  keep_freed_memory()
  experiment = config_door.load(_CONFIG)
  workdir = process_flags.workdir(_WORKDIR)
  process_flags.join(experiment, (_STAGE, _EXPLAIN_SHARDING, _REPLAY_STEP))
  if _EXPLAIN_SHARDING.value:
    if processes.is_first():
      print(model_flags.explain_sharding(experiment, experiment.pipeline))
    return
  enable_compilation_cache()
  if _REPLAY_STEP.value:
    page = replay_in_pipeline(
      experiment,
      workdir,
      stage=model_flags.stage_name(experiment, _STAGE.value),
      step=_REPLAY_STEP.value,
      say=say_on_stderr,
    )
    print(page)
    return
  model_flags.refuse_given(
    _STAGE, why="the pipeline says which stages run; it is for --replay_step"
  )
  finished = run_pipeline(experiment, workdir, say=say_on_stderr)
  if finished is None:
    return
  if finished.did_nothing:
    say_on_stderr("every stage was done before; this is what they gave")
  print(summary_table(finished.report))
  print(f"\nReport: {finished.report_path}")


if __name__ == "__main__":
  app.run(main)
