"""Counts parameters and FLOPs of a config's models, by part.

  python -m aquila_jax.cli.count --config=experiments/configs/aquila_8x16b.py

Nothing is allocated.
"""

from __future__ import annotations

from aquila_jax.cli import app, config_door, model_flags
from aquila_jax.planning import counting

_CONFIG = config_door.define_flag()
_STAGE = model_flags.define_stage()


def main() -> None:
  experiment = config_door.load(_CONFIG)
  names = list(experiment.pipeline)
  if _STAGE.value:
    names = [model_flags.stage_name(experiment, _STAGE.value)]
  for i, name in enumerate(names):
    stage = experiment.stages[name]
    counted = counting.count(
      stage.model, sequence_length=stage.train.sequence_length
    )
    print(("\n" if i else "") + f"{experiment.name}: {name}\n")
    print(counting.format_count(counted))


if __name__ == "__main__":
  app.run(main)
