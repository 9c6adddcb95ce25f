r"""AquilaMoE's tables of initial losses, and what training makes of them.

  python -m benchmarks.reproduce_scale_up --workdir=runs/reproduce_scale_up

Of every seed: train the source, measure the losses right after growth, train
the arms; then, of the first seed, the checks of the config. Stopped at any
instant and started again with the same command, it goes on where it was. After
each arm the results so far and their page are written anew.

run.py says what lies where.
"""

from __future__ import annotations

from absl import flags

from aquila_jax.cli import app
from benchmarks.reproduce_scale_up import smoke
from benchmarks.reproduce_scale_up.run import run
from benchmarks.reproduction import command

_COMMAND = command.define("experiments/configs/reproduce_scale_up.py")
_CHECKS = flags.DEFINE_bool(
  "checks", True, "Other learning rates and a shorter source, of one seed."
)


def main() -> None:
  job = _COMMAND.job(smoke.shrunk)
  run(job, checks=_CHECKS.value)
  print(job.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
