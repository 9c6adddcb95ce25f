from __future__ import annotations

from aquila_jax.planning import counting
from tests.cli import tiny
from tests.cli.commands import SMOKE, succeeded


def _table(name: str) -> str:
  stage = tiny.experiment().stages[name]
  counted = counting.count(
    stage.model, sequence_length=stage.train.sequence_length
  )
  return f"smoke: {name}\n\n{counting.format_count(counted)}\n"


def test_models_are_counted(commands):
  every, one, other = map(
    succeeded,
    commands.run_all(
      [
        ("count", SMOKE),
        ("count", SMOKE, "--stage=control"),
        (
          "count",
          SMOKE,
          "--stage=dense",
          "--config.stages.dense.model.num_layers=3",
        ),
      ]
    ),
  )
  assert every.out == "\n".join(map(_table, tiny.experiment().pipeline))
  assert one.out == _table("control")
  # D = 32, F = 64, 2 heads and 1 group of 16, V = 384. A layer: attention
  # 2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) = 3,136, FFN 3 * 32 * 64 = 6,144,
  # norms 64; and a table of 12,288 and a norm of 32: 12,320 + 3 * 9,344.
  total = other.out.splitlines()[-3].split()
  assert total[:3] == ["total", "40,352", "40,352"]
