"""Kills a run at random moments: python -m tests.torture --kills=50 --seed=0.

A short run of all stages is killed by SIGKILL again and again, anywhere between
its first word and its end, and started again. Whenever it gets to its end, its
MODELs, moments and rows are those of a run that was never stopped, to the bit;
then another one begins, until there were as many kills as asked for.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import random
import re
import shutil
import subprocess
import tempfile
import time

from tests.cli.commands import Commands
from tests.cli.short_run import assert_same_run, command

_GOING_ON = re.compile(r"^(\w+: going on from step \d+)$", re.MULTILINE)


def main() -> None:
  """Ends with an AssertionError at the first bit that differs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    _torture(
      pathlib.Path(folder), arguments.kills, random.Random(arguments.seed)
    )


def _torture(folder: pathlib.Path, kills: int, moments: random.Random) -> None:
  commands = Commands(folder / "xla")
  unbroken, broken = folder / "unbroken", folder / "broken"
  _run(commands, unbroken, None)  # fills the cache of programs
  shutil.rmtree(unbroken)
  begun = time.monotonic()
  _run(commands, unbroken, None)
  seconds = time.monotonic() - begun
  print(f"a run that is not stopped takes {seconds:.1f} s", flush=True)

  ends, resumed, done = 0, collections.Counter(), 0
  while done < kills:
    killed, said = _run(commands, broken, moments.uniform(0, seconds))
    resumed.update(_GOING_ON.findall(said))
    if killed:
      done += 1
      print(f"kill {done} of {kills}", flush=True)
      continue
    ends += 1
    _compare(broken, unbroken)
  killed, said = _run(commands, broken, None)
  assert not killed
  resumed.update(_GOING_ON.findall(said))
  _compare(broken, unbroken)
  for line, times in sorted(resumed.items()):
    print(f"{times:3d} x {line}")
  print(f"{done} kills, {ends + 1} ends, each bit for bit the unbroken run's")


def _run(
  commands: Commands, workdir: pathlib.Path, after_s: float | None
) -> tuple[bool, str]:
  """A start, killed `after_s` seconds after it holds its workdir.

  Returns:
    Whether it was killed, and what it said.
  """
  with commands.start(*command(workdir)) as process:
    # A killed run leaves its file: it is another process that must hold it.
    held = f'"pid": {process.pid},'
    while process.poll() is None and held not in _text(workdir / "lock"):
      time.sleep(0.01)
    try:
      out, err = process.communicate(timeout=after_s)
    except subprocess.TimeoutExpired:
      process.kill()
      out, err = process.communicate()
  if process.returncode == -9:
    return True, err
  assert process.returncode == 0, err + out
  return False, err


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except FileNotFoundError:
    return ""


def _compare(found: pathlib.Path, expected: pathlib.Path) -> None:
  assert_same_run(found, expected)
  left = [p for p in found.rglob("*") if "tmp" in p.name or "partial" in p.name]
  assert not left, left
  assert not list(found.rglob("damaged_checkpoints"))
  shutil.rmtree(found)


if __name__ == "__main__":
  main()
