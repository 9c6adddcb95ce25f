"""Runs that meet damage, a full disk, a second run, a kill, a watchdog."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import time

import pytest
from etils import epath

from aquila_jax.training.metrics import read_rows
from tests.cli.commands import SMOKE, Commands, ended, names, succeeded

STEPS = 8
# Of a row: the clock's.
TIMES = {"wall_s", "tokens_per_s", "mfu", "data_wait_share"}


def _command(data: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
  train = "--config.stages.dense.train"
  return (
    "train",
    SMOKE,
    "--stage=dense",
    f"--config.data.prepared={data}",
    f"--workdir={workdir}",
    f"{train}.steps={STEPS}",
    f"{train}.log_every=3",
    f"{train}.evaluate_every=4",
    f"{train}.optimizer.warmup_steps=1",
    f"{train}.checkpoint.every_steps=2",
    f"{train}.checkpoint.keep_last=4",
  )


@pytest.fixture(scope="module")
def whole(commands: Commands, data, tmp_path_factory) -> pathlib.Path:
  """A run that nothing happened to, with the checkpoints 2, 4, 6, 8."""
  workdir = tmp_path_factory.mktemp("survival") / "whole"
  succeeded(commands.run(*_command(data, workdir)))
  assert names(workdir / "checkpoints") == ["2", "4", "6", "8"]
  return workdir


def _before_its_end(whole: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  """What a run leaves that was killed before it wrote its MODEL."""
  shutil.copytree(whole, to)
  shutil.rmtree(to / "model")
  (to / "result.json").unlink()
  return to


def _truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def _flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 8
  path.write_bytes(bytes(content))


def _table(workdir: pathlib.Path, step: int) -> pathlib.Path:
  return workdir / f"checkpoints/{step}/state/params.embedding.table/c/0/0"


def _rows(path: pathlib.Path):
  rows = read_rows(epath.Path(path))
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def _assert_same_run(
  found: pathlib.Path, expected: pathlib.Path, *, but: str = ""
) -> None:
  for path in (expected / "model").rglob("*"):
    if path.is_file() and path.name != but:
      other = found / path.relative_to(expected)
      assert other.read_bytes() == path.read_bytes(), path
  for name in ("metrics.jsonl", "validation.jsonl"):
    assert _rows(found / name) == _rows(expected / name)


def test_damaged_checkpoints_are_passed_over_to_the_bits_of_a_whole_run(
  commands, data, whole, tmp_path
):
  run = _before_its_end(whole, tmp_path / "run")
  _truncate(_table(run, 8))
  _table(run, 6).unlink()
  _flip(_table(run, 4))
  one = succeeded(commands.run(*_command(data, run)))
  size = _table(whole, 8).stat().st_size
  aside = "; the checkpoint is passed over, and moved to"
  table = "state/params.embedding.table/c/0/0"
  lines = one.err.splitlines()
  assert (
    f"{run}/checkpoints/8/{table} has {size - 1} bytes instead of {size}{aside}"
    f" {run}/damaged_checkpoints/8"
  ) in lines
  assert (
    f"{run}/checkpoints/6/{table} is missing{aside} {run}/damaged_checkpoints/6"
  ) in lines
  (flipped,) = [line for line in lines if f"checkpoints/4/{table}" in line]
  assert " has the CRC-32 " in flipped
  assert flipped.endswith(f"{aside} {run}/damaged_checkpoints/4")
  assert "dense: going on from step 2" in lines
  spent = json.loads((run / "result.json").read_text())["spent_s"]
  steps, total = spent["steps"], sum(spent.values())
  (goodput,) = [line for line in lines if " s in steps; " in line]
  assert goodput.startswith(
    f"dense: {100 * steps / total:.1f} % of {total:.1f} s in steps; "
  )
  for part in spent.keys() - {"steps"}:
    assert f" {part.replace('_', ' ')} " in goodput
  rows = read_rows(epath.Path(run / "metrics.jsonl"))
  assert all(0 <= row["data_wait_share"] <= 1 for row in rows)
  assert names(run / "damaged_checkpoints") == ["4", "6", "8"]
  assert names(run / "checkpoints") == ["2", "4", "6", "8"]
  _assert_same_run(run, whole)


def test_without_a_whole_checkpoint_it_ends_with_2_and_touches_nothing(
  commands, data, whole, tmp_path
):
  run = _before_its_end(whole, tmp_path / "run")
  for step in (4, 6):
    shutil.rmtree(run / "checkpoints" / str(step))
  _table(run, 8).unlink()
  (run / "checkpoints/2/MANIFEST.json").unlink()
  before = sorted(run.rglob("*"))
  for _ in range(2):
    one = commands.run(*_command(data, run))
    assert (one.code, one.out) == (2, "")
    assert one.last_line == (
      f"aquila_jax: {run}/checkpoints: no checkpoint is whole:"
      " 8/state/params.embedding.table/c/0/0 is missing; 2/MANIFEST.json is"
      " missing; put one back from a copy, or remove the directory to begin the"
      " stage anew"
    )
  assert sorted(run.rglob("*")) == before


def test_a_second_run_is_refused_and_a_killed_one_does_not_block_a_watched_one(
  commands, data, whole, tmp_path
):
  run = _before_its_end(whole, tmp_path / "run")
  with commands.start(*_command(data, run)) as first:
    while not (run / "lock").exists() or not (run / "lock").read_bytes():
      assert first.poll() is None, first.communicate()
      time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    commands.assert_refused(
      {
        "a second run": (
          _command(data, run),
          f"--workdir='{run}': process {first.pid} on {socket.gethostname()} is"
          " running in it; wait for its end or stop it, or use another workdir",
        )
      }
    )
    first.kill()
  assert (run / "lock").exists()
  # Watched so closely that every step takes too long.
  watch = "--config.stages.dense.train.watchdog_s=0.001"
  watched = succeeded(commands.run(*_command(data, run), watch))
  assert "\nno step for 0.001 s; the run goes on; its threads:\n" in watched.err
  assert f'{os.sep}training{os.sep}loop.py", line' in watched.err
  assert not (run / "lock").exists()
  # The lineage says how it was watched.
  _assert_same_run(run, whole, but="config.json")


def test_a_full_disk_ends_with_4_and_the_checkpoint_before_stands(
  commands, data, whole, tmp_path
):
  run = _before_its_end(whole, tmp_path / "run")
  for step in (4, 6, 8):
    shutil.rmtree(run / "checkpoints" / str(step))
  limit = _table(whole, 8).stat().st_size - 1
  # So that step 4 was to replace step 2.
  keep = "--config.stages.dense.train.checkpoint.keep_last=1"
  with commands.start(*_command(data, run), keep) as process:
    # No file may be larger than that: what a full disk is to a test.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    one = ended(process)
  assert (one.code, one.out) == (4, ""), one.err
  assert one.last_line == (
    f"aquila_jax: {run}/checkpoints: step 4 could not be saved: File too large;"
    f" the last good checkpoint is of step 2, in {run}/checkpoints; free some"
    " space, and the same command goes on"
  )
  assert names(run / "checkpoints") == ["2"]
  assert sorted(os.listdir(run)) == sorted(
    set(os.listdir(whole)) - {"model", "result.json"}
  )
