"""A whole experiment, killed in every stage: the same bits as unbroken."""

from __future__ import annotations

import json
import pathlib
import signal
import time

import numpy as np
import pytest
from etils import epath

from aquila_jax.training.metrics import read_rows
from tests.cli.commands import Commands, Ended, ended, names, succeeded
from tests.cli.short_run import STAGES, assert_same_run, command, files


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
  with commands.start(*command(workdir)) as process:
    while not _saved_steps(directory) - before:
      assert process.poll() is None, process.communicate()
      time.sleep(0.005)
    process.send_signal(number)
    one = ended(process)
  assert not (directory / "model").exists(), "it was stopped too late"
  return one, max(_saved_steps(directory))


@pytest.mark.long
def test_stopped_in_every_stage_it_gives_the_bits_of_an_unbroken_run(
  commands, tmp_path
):
  unbroken, workdir = tmp_path / "unbroken", tmp_path / "broken"
  expected = succeeded(commands.run(*command(unbroken)))

  going_on = ""
  for stage, number in (
    ("dense", signal.SIGKILL),
    ("scale_up", signal.SIGTERM),
    ("scale_up", signal.SIGKILL),
    ("scale_out", signal.SIGKILL),
    ("control", signal.SIGKILL),
  ):
    one, step = _stop(commands, workdir, stage, number)
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

  finished = succeeded(commands.run(*command(workdir)))
  assert going_on in finished.err
  for stage in STAGES[:-1]:
    assert f"\n{stage}: done\n" in finished.err
  assert_same_run(workdir, unbroken)

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

  _assert_nothing_is_done_again(commands, workdir, finished)
  _assert_a_step_is_taken_again(commands, workdir)
  _assert_changes_are_refused(commands, workdir)


def _assert_nothing_is_done_again(
  commands: Commands, workdir: pathlib.Path, finished: Ended
) -> None:
  before = files(workdir / "stages")
  again = succeeded(commands.run(*command(workdir)))
  assert again.out == finished.out
  assert "compil" not in again.err
  assert again.last_line == (
    "every stage was done before; this is what they gave"
  )
  assert files(workdir / "stages") == before


def _assert_a_step_is_taken_again(
  commands: Commands, workdir: pathlib.Path
) -> None:
  """Of a grown stage; what the run wrote stands."""
  before = files(workdir / "stages")
  again = ("--stage=scale_out", "--replay_step=7")
  one = succeeded(commands.run(*command(workdir, *again)))
  folder = workdir / "stages/scale_out/replay/step_7"
  assert one.out.endswith(f"\nall of it: {folder}\n")
  report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
  assert one.out.startswith(f"step 7: loss {report['loss']:.4f}, gradient ")
  rows = read_rows(epath.Path(workdir) / "stages/scale_out/metrics.jsonl")
  assert report["gradient_norm"] == rows[-1]["gradient_norm"]
  assert len(report["rows"]) == 8
  texts = (folder / "rows.txt").read_text(encoding="utf-8")
  assert texts.count("=== row ") == 8
  with np.load(folder / "batch.npz") as batch:
    assert batch["nats"].shape == batch["tokens"].shape
  after = files(workdir / "stages")
  assert {k: v for k, v in after.items() if "/replay/" not in k} == before
  commands.assert_refused(
    {
      "a step beyond the end": (
        command(workdir, "--stage=dense", "--replay_step=12"),
        "--replay_step=12: expected a step of 1 to 11",
      ),
      "a stage alone": (
        command(workdir, "--stage=dense"),
        "--stage=dense: the pipeline says which stages run; it is for"
        " --replay_step",
      ),
      "no such stage": (
        command(workdir, "--stage=dens", "--replay_step=1"),
        "--stage='dens' is unknown; did you mean 'dense'?",
      ),
    }
  )


def _assert_changes_are_refused(
  commands: Commands, workdir: pathlib.Path
) -> None:
  before = files(workdir)
  changed = commands.run(
    *command(workdir, "--config.stages.dense.train.batch_size=16")
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
        command(workdir, "--config.stages.dense.train.bach_size=16"),
        "config.stages.dense.train.bach_size=16 is not a field of"
        " config.stages.dense.train; did you mean 'batch_size'?",
      )
    }
  )
  assert files(workdir) == before
