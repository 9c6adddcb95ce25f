r"""What upcycling buys: mixtures from a dense checkpoint, and from scratch.

  python -m benchmarks.reproduce_scale_out --workdir=runs/reproduce_scale_out

Of every seed: train the source, then arm after arm, and look at the experts of
each. Stopped at any instant and started again with the same command, it goes on
where it was. After each arm the results so far and their page are written anew.

run.py says what lies where.
"""

from __future__ import annotations

from aquila_jax.cli import app
from benchmarks.reproduce_scale_out import smoke
from benchmarks.reproduce_scale_out.run import run
from benchmarks.reproduction import command

_COMMAND = command.define("experiments/configs/reproduce_scale_out.py")


def main() -> None:
  job = _COMMAND.job(smoke.shrunk)
  run(job)
  print(job.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
