r"""What training would cost on TPUs that are not there.

  python -m aquila_jax.cli.plan compile \
    --config=experiments/configs/aquila_8x16b.py --topology=v5p:4x4x8 \
    [--config.mesh.fsdp=16 ...] [--tokens=N] [--output=FILE]

compiles a stage's training step by the TPU's own compiler (the extra `tpu`; no
TPU is needed, and some minutes for a large model), and prints whether it fits,
what takes the memory, what a step takes and why, and the days for the tokens.

  ... plan memory --config=... --topology=v5p:4x4x8
  ... plan search --config=... --kind=v5p --devices=128 [--best=N]

need no compiler: `memory` estimates the bytes of a device, `search` ranks the
meshes, microbatches and remat that fit by what a roofline says of a step.

  ... plan growth --config=... --topology=v5p:4x4x8
  ... plan export --config=...

say what the transform before a stage takes of devices, by the compiler, and of
a host, and what an export writes.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from typing import Any

import jax
from absl import flags
from etils import epath

from aquila_jax.cli import app, config_door, model_flags
from aquila_jax.core import errors, files
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.pipeline import budget
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.pipeline.planned import plan_memory, plan_step
from aquila_jax.pipeline.planned_growth import plan_export, plan_growth
from aquila_jax.planning import (
  plan_search,
  quick_plan,
  step_plan,
  transform_plan,
)
from aquila_jax.planning.pods import KINDS, Pod
from aquila_jax.planning.quick_plan import QuickPlan

_CONFIG = config_door.define_flag()
_STAGE = model_flags.define_stage()
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  "",
  "Kind and chips along each dimension: v5p:4x4x8, v6e:16x16, v5e:4x8.",
)
_KIND = flags.DEFINE_string(
  "kind", "", f"Of the chips, with --devices: {', '.join(KINDS)}."
)
_DEVICES: flags.FlagHolder[int] = flags.DEFINE_integer(  # pyright: ignore
  "devices", 0, "Chips, with --kind, in place of --topology.", 0
)
_TOKENS: flags.FlagHolder[int] = flags.DEFINE_integer(  # pyright: ignore
  "tokens", 0, "Token budget of the days; 0 is that of the stage.", 0
)
_BEST: flags.FlagHolder[int] = flags.DEFINE_integer(  # pyright: ignore
  "best", 10, "Rows that `search` prints.", 1
)
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file to write.")


def main(what: str | None) -> None:
  verbs = {
    "compile": _compile,
    "memory": _memory,
    "search": _search,
    "growth": _growth,
  }
  if what not in (*verbs, "export"):
    expected = ", ".join(f"`plan {verb}`" for verb in (*verbs, "export"))
    given = "nothing" if what is None else repr(what)
    raise errors.UserError(f"{given}: expected {expected}, then flags")
  # The compiler is asked for by its topology; no device is.
  jax.config.update("jax_platforms", "cpu")
  experiment = config_door.load(_CONFIG)
  name = model_flags.stage_name(experiment, _STAGE.value)
  if _OUTPUT.value:
    _check_output(_OUTPUT.value)
  if what == "export":
    _export(experiment, name)
  else:
    verbs[what](experiment, name, _topology())


def _topology() -> str:
  """Of --topology, or the most compact of --kind and --devices."""
  if bool(_TOPOLOGY.value) == bool(_KIND.value or _DEVICES.value):
    both = "and --kind or --devices are given; expected one of the two ways"
    none = "expected it, or --kind and --devices"
    raise errors.UserError(
      f"--topology={_TOPOLOGY.value}: {both if _TOPOLOGY.value else none}"
    )
  if _TOPOLOGY.value:
    return _TOPOLOGY.value
  return Pod.of_count(_KIND.value, _DEVICES.value).topology


def _compile(experiment: ExperimentConfig, name: str, topology: str) -> None:
  train = experiment.stages[name].train
  tokens = _TOKENS.value or (
    budget.total_steps(experiment, name) * train.tokens_per_step
  )
  say_on_stderr(f"compiling the step of {name} for {topology}")
  plan = plan_step(experiment, name, topology)
  print(step_plan.table(plan, token_budget=tokens))
  _write(plan.to_json(token_budget=tokens))


def _memory(experiment: ExperimentConfig, name: str, topology: str) -> None:
  plan = plan_memory(experiment, name, Pod.of(topology))
  print(quick_plan.memory_table(plan))
  _write(plan.to_json())


def _search(experiment: ExperimentConfig, name: str, topology: str) -> None:
  stage, pod = experiment.stages[name], Pod.of(topology)
  found = plan_search.search(name, stage.model, stage.train, pod)
  if not found:
    raise errors.UserError(
      f"--topology={topology}: by no mesh, microbatches and remat does {name}"
      " fit; expected more chips, or a batch of which they divide the rows"
    )
  best = found[: _BEST.value]
  commands = [_command(name, plan) for plan in best]
  print(f"{name} on {topology}: {len(found)} fit, the best {len(best)}\n")
  print(quick_plan.search_table(best, commands))
  _write(
    [
      plan.to_json() | dict(command=command)
      for plan, command in zip(best, commands, strict=True)
    ]
  )


def _growth(experiment: ExperimentConfig, name: str, topology: str) -> None:
  plan = plan_growth(experiment, name, topology)
  print(transform_plan.growth_table(plan))
  _write(plan.to_json())


def _export(experiment: ExperimentConfig, name: str) -> None:
  sizes, read = plan_export(experiment.stages[name].model)
  print(f"the export of {name}, {sizes['bfloat16'].architecture}\n")
  print(transform_plan.export_table(sizes, read=read))
  _write(
    dict(
      stage=name,
      read=read,
      dtypes={
        dtype: dataclasses.asdict(size)
        | dict(seconds=transform_plan.export_seconds(read, size.num_bytes))
        for dtype, size in sizes.items()
      },
    )
  )


def _command(name: str, plan: QuickPlan) -> str:
  """Compiles what a row of the search has."""
  step, stage = plan.step, f"config.stages.{name}"
  chosen = {
    **{f"config.mesh.{axis}": n for axis, n in step.mesh.shape.items()},
    f"{stage}.model.remat": step.model.remat,
    f"{stage}.train.num_microbatches": step.train.num_microbatches,
  }
  given = {f"config.{path}": value for path, value in config_door.overrides()}
  words = [
    "python -m aquila_jax.cli.plan compile",
    f"--config={shlex.quote(_CONFIG.value)}",
    f"--stage={name}",
    f"--topology={plan.pod.topology}",
    *(
      f"--{path}={shlex.quote(str(v))}" for path, v in (given | chosen).items()
    ),
  ]
  return " ".join(words)


def _check_output(output: str) -> None:
  path = epath.Path(output).expanduser()
  if not path.parent.is_dir():
    raise errors.UserError(
      f"--output={output}: {path.parent} is not a directory"
    )
  if path.exists() and not os.path.isfile(path):
    raise errors.UserError(f"--output={output}: expected a file")


def _write(value: Any) -> None:
  if _OUTPUT.value:
    files.replace_text(
      epath.Path(_OUTPUT.value).expanduser(), quick_plan.dumps(value)
    )


if __name__ == "__main__":
  app.run_with_name(main)
