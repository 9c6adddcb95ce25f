"""A short run of all stages, and what must be the same of two of them."""

from __future__ import annotations

import pathlib
from typing import Any

from etils import epath

from aquila_jax.training.metrics import read_rows
from tests.cli.commands import SMOKE

STAGES = ("dense", "scale_up", "scale_out", "control")
STEPS = {"dense": 11, "scale_up": 13, "scale_out": 7}
# Rows of three steps, so that many of them span a stop.
LOG_EVERY, SAVE_EVERY, VALIDATE_EVERY = 3, 2, 4

OVERRIDES = (
  *(f"--config.stages.{name}.train.steps={n}" for name, n in STEPS.items()),
  *(
    f"--config.stages.{name}.train.{field}={value}"
    for name in STAGES
    for field, value in (
      ("log_every", LOG_EVERY),
      ("evaluate_every", VALIDATE_EVERY),
      ("checkpoint.every_steps", SAVE_EVERY),
      ("optimizer.warmup_steps", 1),
      # So that the mixture and its control are one program.
      ("optimizer.schedule", "constant"),
    )
  ),
  "--config.stages.scale_up.init.compare=()",
  "--config.evaluation.prompts=()",
)
# Of a row: the clock's.
TIMES = {"wall_s", "tokens_per_s", "mfu", "data_wait_share"}


def command(workdir: pathlib.Path, *more: str) -> tuple[str, ...]:
  """The verb and its flags; `more` of them behind."""
  return (
    "efficient_scale",
    SMOKE,
    f"--workdir={workdir}",
    *OVERRIDES,
    *more,
  )


def files(directory: pathlib.Path) -> dict[str, bytes]:
  """All that is below a directory."""
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in sorted(directory.rglob("*"))
    if path.is_file()
  }


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """What does not depend on the clock."""
  rows = read_rows(epath.Path(path))
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def _last_step(stage: pathlib.Path) -> int:
  step = _rows(stage / "metrics.jsonl")[-1]["step"]
  assert isinstance(step, int)
  return step


def assert_same_run(found: pathlib.Path, expected: pathlib.Path) -> None:
  """Bit for bit: MODELs with their moments, and every row but for times."""
  for name in STAGES:
    one, other = found / "stages" / name, expected / "stages" / name
    # Parameters, moments, lineage and tokenizer.
    assert files(one / "model") == files(other / "model"), name
    for file in ("metrics.jsonl", "validation.jsonl"):
      assert _rows(one / file) == _rows(other / file), (name, file)
    if (other / "routing.jsonl").exists():
      file = "routing.jsonl"
      assert _rows(one / file) == _rows(other / file), (name, file)
    for file in ("stage.json", "evaluation.json"):
      assert (one / file).read_bytes() == (other / file).read_bytes()
    total = STEPS.get(name, _last_step(other))
    steps = [row["step"] for row in _rows(one / "metrics.jsonl")]
    due = range(1, total + 1)
    assert steps == [s for s in due if s % LOG_EVERY == 0 or s == total]
    validated = [row["step"] for row in _rows(one / "validation.jsonl")]
    assert validated == [
      s for s in due if s % VALIDATE_EVERY == 0 or s == total
    ]
