"""A whole experiment, killed in every stage: the same bits as unbroken."""

from __future__ import annotations

import json
import pathlib
import signal
import time
from typing import Any

from etils import epath

from aquila_jax.training.metrics import read_rows
from tests.cli.commands import SMOKE, Commands, Ended, ended, names, succeeded

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


def _command(workdir: pathlib.Path, *more: str) -> tuple[str, ...]:
  return (
    "efficient_scale",
    SMOKE,
    f"--workdir={workdir}",
    *OVERRIDES,
    *more,
  )


def _saved_steps(stage: pathlib.Path) -> set[int]:
  """Of the checkpoints that are whole."""
  directory = stage / "checkpoints"
  if not directory.exists():
    return set()
  return {int(name) for name in names(directory) if name.isdigit()}


def _stop(
  commands: Commands, workdir: pathlib.Path, stage: str, number: signal.Signals
) -> tuple[Ended, int]:
  """Runs until `stage` has one more checkpoint, and stops it there.

  Args:
    commands: starts it.
    workdir: of the experiment.
    stage: to be stopped.
    number: the signal.

  Returns:
    What the process left, and the newest step that is saved.
  """
  directory = workdir / "stages" / stage
  before = _saved_steps(directory)
  with commands.start(*_command(workdir)) as process:
    while not _saved_steps(directory) - before:
      assert process.poll() is None, process.communicate()
      time.sleep(0.005)
    process.send_signal(number)
    one = ended(process)
  assert not (directory / "model").exists(), "it was stopped too late"
  return one, max(_saved_steps(directory))


def _files(directory: pathlib.Path) -> dict[str, bytes]:
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


def _assert_same_run(found: pathlib.Path, expected: pathlib.Path) -> None:
  for name in STAGES:
    one, other = found / "stages" / name, expected / "stages" / name
    # Parameters, moments, lineage and tokenizer.
    assert _files(one / "model") == _files(other / "model"), name
    for file in ("metrics.jsonl", "validation.jsonl"):
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


def test_stopped_in_every_stage_it_gives_the_bits_of_an_unbroken_run(
  quick, tmp_path
):
  unbroken, workdir = tmp_path / "unbroken", tmp_path / "broken"
  expected = succeeded(quick.run(*_command(unbroken)))

  going_on = ""
  for stage, number in (
    ("dense", signal.SIGKILL),
    ("scale_up", signal.SIGTERM),
    ("scale_up", signal.SIGKILL),
    ("scale_out", signal.SIGKILL),
    ("control", signal.SIGKILL),
  ):
    one, step = _stop(quick, workdir, stage, number)
    assert going_on in one.err
    if number == signal.SIGTERM:
      assert one.code == 128 + signal.SIGTERM
      assert one.last_line == (
        f"aquila_jax: stopped by SIGTERM after step {step}, which is saved; the"
        " same command goes on from there"
      )
    else:
      assert one.code == -signal.SIGKILL
    assert one.out == ""
    going_on = f"\n{stage}: going on from step {step}\n"

  finished = succeeded(quick.run(*_command(workdir)))
  assert going_on in finished.err
  for stage in STAGES[:-1]:
    assert f"\n{stage}: done\n" in finished.err
  _assert_same_run(workdir, unbroken)

  # What is shown is the same but for seconds, and where the report lies.
  for one, directory in ((expected, unbroken), (finished, workdir)):
    assert one.out.startswith("smoke: stages\n\n stage ")
    assert "\n\nsmoke: test split\n\n stage " in one.out
    assert one.out.endswith(f"\n\nReport: {directory}/report.html\n")
  scores = [
    one.out.split("smoke: test split\n")[1].split("\n\n")[0]
    for one in (expected, finished)
  ]
  assert scores[0] == scores[1]
  page = (workdir / "report.html").read_text(encoding="utf-8")
  assert page.startswith("<!DOCTYPE html>")
  summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
  assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
  half_written = [p for p in workdir.rglob("*") if ".partial" in p.name]
  assert half_written == []

  _assert_nothing_is_done_again(quick, workdir, finished)
  _assert_changes_are_refused(quick, workdir)


def _assert_nothing_is_done_again(
  commands: Commands, workdir: pathlib.Path, finished: Ended
) -> None:
  before = _files(workdir / "stages")
  again = succeeded(commands.run(*_command(workdir)))
  assert again.out == finished.out
  assert "compil" not in again.err
  assert again.last_line == (
    "every stage was done before; this is what they gave"
  )
  assert _files(workdir / "stages") == before


def _assert_changes_are_refused(
  commands: Commands, workdir: pathlib.Path
) -> None:
  before = _files(workdir)
  changed = commands.run(
    *_command(workdir, "--config.stages.dense.train.batch_size=16")
  )
  assert (changed.code, changed.out) == (2, "")
  assert changed.last_line == (
    f"aquila_jax: {workdir}/stages/dense/stage.json was made with another"
    " config; use another workdir, or change back:"
    " config.stages.dense.train.batch_size: 8 -> 16"
  )
  commands.assert_refused(
    {
      "a typo": (
        _command(workdir, "--config.stages.dense.train.bach_size=16"),
        "config.stages.dense.train.bach_size=16 is not a field of"
        " config.stages.dense.train; did you mean 'batch_size'?",
      )
    }
  )
  assert _files(workdir) == before
