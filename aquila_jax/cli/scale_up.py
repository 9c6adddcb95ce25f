r"""Grows a MODEL in width and depth.

  python -m aquila_jax.cli.scale_up --source=MODEL --output=MODEL \
    --config=experiments/configs/quickstart.py --method=aki_pro

The config is the target's: of several stages, the one that scales up or that
--stage names. What no flag says, and the maps and depth rule, are its init's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from absl import flags

from aquila_jax.cli import app, config_door, model_flags
from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  GrowthMethod,
  OptimizerRule,
  ScaleUp,
  StageConfig,
)
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.growth.streaming import stream_scale_up

_CONFIG = config_door.define_flag()
_STAGE = model_flags.define_stage()
_SOURCE = flags.DEFINE_string("source", None, "A MODEL.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A new MODEL.", required=True)
_METHOD = flags.DEFINE_string(
  "method", None, f"One of {', '.join(get_args(GrowthMethod))}."
)
_OPTIMIZER = flags.DEFINE_string(
  "optimizer", None, "grow the optimizer state, or reset; or the config's."
)
_SEED = model_flags.define_seed("Of random maps and of method=random.")


def main() -> None:
  experiment = config_door.load(_CONFIG)
  name = model_flags.stage_name(experiment, _STAGE.value, kind="scale_up")
  stage = experiment.stages[name]
  options = _options(stage, name)
  model_flags.check_output(_OUTPUT.value)
  source = model_flags.open_source(_SOURCE.value, optimizer=_OPTIMIZER.value)
  chosen: dict[str, Any] = dict(
    seed=_SEED.value, name=name, path=f"config.stages.{name}.model"
  )
  if options.method == "random":  # reads nothing of the source
    grown = scale_up(source.model, stage.model, options, **chosen)
    model_flags.save(_OUTPUT.value, grown)
    return
  grown = stream_scale_up(
    source,
    _OUTPUT.value,
    stage.model,
    options,
    progress=model_flags.now_and_then(),
    **chosen,
  )
  with_optimizer = options.optimizer == "grow" and source.optimizer is not None
  model_flags.say_written(_OUTPUT.value, grown, with_optimizer=with_optimizer)


def _options(stage: StageConfig, name: str) -> ScaleUp:
  """The init of the stage where it scales up, and the flags over it."""
  init = stage.init if isinstance(stage.init, ScaleUp) else ScaleUp(source="")
  given: dict[str, Any] = {"source": _SOURCE.value, "compare": ()}
  for flag, valid in (
    (_METHOD, get_args(GrowthMethod)),
    (_OPTIMIZER, get_args(OptimizerRule)),
  ):
    if flag.value is None:
      continue
    if flag.value not in valid:
      raise errors.unknown_name(f"--{flag.name}", flag.value, valid)
    given[flag.name] = flag.value
  try:
    return dataclasses.replace(init, **given)
  except ValueError as error:
    raise errors.UserError(f"config.stages.{name}.init.{error}") from error


if __name__ == "__main__":
  app.run(main)
