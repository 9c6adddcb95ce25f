r"""What training would cost on TPUs that are not there.

  python -m aquila_jax.cli.plan compile \
    --config=experiments/configs/aquila_8x16b.py --topology=v5p:4x4x8 \
    [--config.mesh.fsdp=16 ...] [--tokens=N] [--output=FILE]

compiles a stage's training step by the TPU's own compiler (the extra `tpu`; no
TPU is needed, and some minutes for a large model), and prints whether it fits,
what takes the memory, what a step takes and why, and the days for the tokens.
"""

from __future__ import annotations

import jax
from absl import flags
from etils import epath

from aquila_jax.cli import app, config_door, model_flags
from aquila_jax.core import errors, files
from aquila_jax.pipeline import budget
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.pipeline.planned import plan_step
from aquila_jax.planning import step_plan

_CONFIG = config_door.define_flag()
_STAGE = model_flags.define_stage()
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Kind and chips along each dimension: v5p:4x4x8, v6e:16x16, v5e:4x8.",
  required=True,
)
_TOKENS: flags.FlagHolder[int] = flags.DEFINE_integer(  # pyright: ignore
  "tokens", 0, "Token budget of the days; 0 is that of the stage.", 0
)
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file to write.")


def main(what: str | None) -> None:
  if what != "compile":
    raise errors.UserError(f"{what!r}: expected `plan compile`, then flags")
  # The compiler is asked for by its topology; no device is.
  jax.config.update("jax_platforms", "cpu")
  experiment = config_door.load(_CONFIG)
  name = model_flags.stage_name(experiment, _STAGE.value)
  train = experiment.stages[name].train
  tokens = _TOKENS.value or (
    budget.total_steps(experiment, name) * train.tokens_per_step
  )
  if _OUTPUT.value:
    _check_output(_OUTPUT.value)
  say_on_stderr(f"compiling the step of {name} for {_TOPOLOGY.value}")
  plan = plan_step(experiment, name, _TOPOLOGY.value)
  print(step_plan.table(plan, token_budget=tokens))
  if _OUTPUT.value:
    files.replace_text(
      epath.Path(_OUTPUT.value).expanduser(),
      step_plan.dumps(plan, token_budget=tokens),
    )


def _check_output(output: str) -> None:
  parent = epath.Path(output).expanduser().parent
  if not parent.is_dir():
    raise errors.UserError(f"--output={output}: {parent} is not a directory")


if __name__ == "__main__":
  app.run_with_name(main)
