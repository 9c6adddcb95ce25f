"""Commands without the two seconds that their imports take.

One process imports what they need and forks for each of them. A fork has a
command's arguments, environment, directory and standard streams, and ends as it
does; what differs is that modules were imported before. `Commands.start` starts
a process as users do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.cli.preloaded"])


def run(
  verb: str,
  arguments: Sequence[str],
  *,
  directory: pathlib.Path,
  environment: Mapping[str, str],
) -> tuple[int, str, str]:
  """Runs a command to its end.

  Args:
    verb: a module of aquila_jax.cli.
    arguments: behind it.
    directory: to run it in.
    environment: all of its variables; those of jax are read at its import and
      must be those of this process.

  Returns:
    The code it ended with, standard output, and standard error.
  """
  with tempfile.TemporaryDirectory() as folder:
    out, err, code = (
      pathlib.Path(folder) / name for name in ("out", "err", "code")
    )
    process = _CONTEXT.Process(
      target=_command,
      args=(verb, list(arguments), str(directory), dict(environment)),
      kwargs=dict(out=str(out), err=str(err), code=str(code)),
    )
    process.start()
    # Its exitcode is lost where another thread starts a process meanwhile.
    process.join()
    assert code.exists(), f"{verb} died: {err.read_text('utf-8')}"
    found = int(code.read_text("utf-8"))
    return found, out.read_text("utf-8"), err.read_text("utf-8")


def _command(
  verb: str,
  arguments: list[str],
  directory: str,
  environment: dict[str, str],
  *,
  out: str,
  err: str,
  code: str,
) -> None:
  """In the fork: the command, and what Python does at its end."""
  for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(path, flags, 0o600), number)
  os.chdir(directory)
  os.environ.clear()
  os.environ.update(environment)
  path = environment.get("PYTHONPATH", "").split(os.pathsep)
  sys.path[:0] = [entry for entry in path if entry]
  module = f"aquila_jax.cli.{verb}"
  sys.argv = [module, *arguments]
  ended: object = 0
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except SystemExit as stop:
    ended = stop.code or 0
  except BaseException:
    traceback.print_exc()
    ended = 1
  atexit._run_exitfuncs()
  if not isinstance(ended, int):  # sys.exit("words")
    print(ended, file=sys.stderr)
    ended = 1
  pathlib.Path(code).write_text(str(ended), "utf-8")
