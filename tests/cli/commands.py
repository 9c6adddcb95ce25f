"""The commands as their users run them: processes in the repository's root."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tests import brief
from tests.cli import forked

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOKE = "--config=experiments/configs/smoke.py"

_AT_ONCE = 3
# Of pytest's own process, not of a user's.
_NOT_OURS = ("XLA_FLAGS", "PYTHONUNBUFFERED", "TOKENIZERS_PARALLELISM")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """What a process left."""

  code: int
  out: str
  err: str

  @property
  def last_line(self) -> str:
    return self.err.splitlines()[-1]


class Commands:
  """Starts commands that share one cache of compiled programs.

  Args:
    cache: the directory of the cache.
    environment: variables on top.
  """

  def __init__(self, cache: pathlib.Path, **environment: str):
    mine = {k: v for k, v in os.environ.items() if k not in _NOT_OURS}
    mine |= {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "XLA_FLAGS": brief.XLA_FLAGS,
    }
    self._cache = cache
    self._environment = mine | environment

  def with_environment(self, **environment: str) -> Commands:
    return Commands(self._cache, **environment)

  def start(self, verb: str, *arguments: object) -> subprocess.Popen[str]:
    """A running command; standard output and error are pipes."""
    return subprocess.Popen(
      [sys.executable, "-m", f"aquila_jax.cli.{verb}", *map(str, arguments)],
      cwd=ROOT,
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      encoding="utf-8",
    )

  def run(self, verb: str, *arguments: object) -> Ended:
    """A command that has ended, however; never with a traceback."""
    # What runs as Python starts does not run in a fork.
    path = self._environment.get("PYTHONPATH", "").split(os.pathsep)
    if any(pathlib.Path(p, "sitecustomize.py").exists() for p in path if p):
      with self.start(verb, *arguments) as process:
        return ended(process)
    code, out, err = forked.run(
      verb,
      [str(argument) for argument in arguments],
      directory=ROOT,
      environment=self._environment,
    )
    assert "Traceback" not in err, err
    return Ended(code=code, out=out, err=err)

  def run_all(self, commands: Sequence[Sequence[object]]) -> list[Ended]:
    """Several at once, in the order of `commands`."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
      return list(
        pool.map(lambda command: self.run(*map(str, command)), commands)
      )

  def assert_refused(
    self, cases: Mapping[str, tuple[Sequence[object], str]]
  ) -> None:
    """Every command ends with 2 and its message as the only line.

    Args:
      cases: by what is wrong, the command and the message.
    """
    found = self.run_all([command for command, _ in cases.values()])
    wrong = []
    for (case, (_, message)), one in zip(cases.items(), found, strict=True):
      expected = Ended(code=2, out="", err=f"aquila_jax: {message}\n")
      if one != expected:
        wrong.append(f"{case}:\n  {one}\n  expected {expected}")
    assert not wrong, "\n".join(wrong)


def ended(process: subprocess.Popen[str]) -> Ended:
  """Waits for a process and reads what it said."""
  out, err = process.communicate()
  assert "Traceback" not in err, err
  return Ended(code=process.returncode, out=out, err=err)


def succeeded(one: Ended) -> Ended:
  assert one.code == 0, one.err
  return one


def names(directory: pathlib.Path) -> list[str]:
  """What a directory holds, hidden and half-written entries among it."""
  return sorted(child.name for child in directory.iterdir())
