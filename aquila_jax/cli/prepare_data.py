r"""Prepares the text of a config: fetch, clean, deduplicate, split, tokenize.

  python -m aquila_jax.cli.prepare_data \
    --config=experiments/configs/quickstart.py --output=data/quickstart

Training with --config.data.prepared=data/quickstart then reads only that.
"""

from __future__ import annotations

from absl import flags

from aquila_jax.cli import app, config_door
from aquila_jax.data.prepare import prepare
from aquila_jax.data.prepared import CARD
from aquila_jax.pipeline.context import say_on_stderr

_CONFIG = config_door.define_flag()
_OUTPUT = flags.DEFINE_string(
  "output", None, "The directory to write.", required=True
)


def main() -> None:
  experiment = config_door.load(_CONFIG)
  prepare(experiment.data, _OUTPUT.value, progress=say_on_stderr)
  print(f"Dataset card: {_OUTPUT.value}/{CARD}")


if __name__ == "__main__":
  app.run(main)
