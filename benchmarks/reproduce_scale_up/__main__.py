r"""AquilaMoE's tables of initial losses, and what training makes of them.

  python -m benchmarks.reproduce_scale_up --workdir=runs/reproduce_scale_up

Of every seed: train the source, measure the losses right after growth, train
the arms; then, of the first seed, the checks of the config. Stopped at any
instant and started again with the same command, it goes on where it was. After
each arm the results so far and their page are written anew.

run.py says what lies where.
"""

from __future__ import annotations

import pathlib

from absl import flags
from etils import epath

from aquila_jax.cli import app, config_door
from aquila_jax.training.compilation import enable_compilation_cache
from benchmarks.reproduce_scale_up import smoke
from benchmarks.reproduce_scale_up.run import Job, run

_CONFIG = config_door.define_flag(required=False)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Takes everything that is written.", required=True
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, in order.")
_CHECKS = flags.DEFINE_bool(
  "checks", True, "Other learning rates and a shorter source, of one seed."
)
_SMOKE = flags.DEFINE_bool(
  "smoke", False, "All of it with tiny models on a few pages of text."
)
_OUTPUT = flags.DEFINE_string(
  "output", "", 'The results, a JSON file; "" is WORKDIR/results.json.'
)
_PAGE = flags.DEFINE_string(
  "page", "", 'Their page; "" is WORKDIR/page.md. The figure lies beside it.'
)

_DEFAULT_CONFIG = "experiments/configs/reproduce_scale_up.py"


def main() -> None:
  if not _CONFIG.present:
    flags.FLAGS[_CONFIG.name].value = _DEFAULT_CONFIG
  experiment = config_door.load(_CONFIG)
  if _SMOKE.value:
    experiment = smoke.shrunk(experiment)
  enable_compilation_cache()
  workdir = epath.Path(_WORKDIR.value).expanduser()
  job = Job(
    experiment=experiment,
    workdir=workdir,
    seeds=tuple(int(seed) for seed in _SEEDS.value),
    output=pathlib.Path(_OUTPUT.value or workdir / "results.json"),
    page=pathlib.Path(_PAGE.value or workdir / "page.md"),
    checks=_CHECKS.value,
  )
  run(job)
  print(job.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
