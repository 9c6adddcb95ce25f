"""One run at a time on one workdir.

The lock is the kernel's, on WORKDIR/lock, and dies with its process, however
that ends. What the file says is for whoever is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from absl import logging
from etils import epath

from aquila_jax.core import disk, errors, processes

NAME = "lock"
_TRIES = 20  # half a second each: a shared disk may be slow to show a file


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Holds a workdir for this process.

  With several processes the first holds it for all, and all must see it. A path
  that is no local directory has no lock; that is logged.

  Args:
    workdir: of a run; it must exist.

  Raises:
    errors.UserError: where another run holds it, naming that; where it cannot
      be written to; where not all processes of this one see the same directory.
  """
  if "://" in os.fspath(workdir):
    logging.info("%s is not local: no lock keeps a second run out", workdir)
    yield
  elif not processes.is_first():
    _check_shared(workdir)
    yield
  else:
    path = os.path.join(workdir, NAME)
    file = _acquire(path)
    try:
      _check_shared(workdir)
      yield
    finally:
      os.unlink(path)  # while it is held: see _acquire
      os.close(file)


def _check_shared(workdir: epath.Path) -> None:
  """Refuses a workdir that is not the one of process 0.

  Raises:
    errors.UserError: in the process that sees another one.
  """
  path = workdir / NAME
  holder = processes.from_first(path.read_text, name="lock")
  for _ in range(_TRIES):
    if path.exists() and path.read_text() == holder:
      return
    time.sleep(0.5)
  raise errors.UserError(
    f"--workdir={str(workdir)!r}: what process 0 writes there is not seen here;"
    " all processes need one directory, on a shared disk or gs://"
  )


def _acquire(path: str) -> int:
  """The descriptor of the lock file, which is held while it is open."""
  while True:
    try:
      file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
      if disk.why_full(error):
        raise
      raise errors.UserError(
        f"--workdir={os.path.dirname(path)!r}: cannot be written to:"
        f" {error.strerror}"
      ) from error
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = os.pread(file, 1000, 0)
      os.close(file)
      raise errors.UserError(_refusal(path, holder)) from None
    if _is_at(file, path):
      break
    # Its holder removed it between our open and our lock.
    os.close(file)
  os.ftruncate(file, 0)
  mine = {"pid": os.getpid(), "host": socket.gethostname()}
  os.pwrite(file, json.dumps(mine).encode(), 0)
  return file


def _is_at(file: int, path: str) -> bool:
  try:
    return os.path.samestat(os.fstat(file), os.stat(path))
  except FileNotFoundError:
    return False


def _refusal(path: str, holder: bytes) -> str:
  try:
    found = json.loads(holder)
    who = f"process {found['pid']} on {found['host']}"
  except (ValueError, KeyError):  # it has the lock and has not yet written
    who = "another process"
  return (
    f"--workdir={os.path.dirname(path)!r}: {who} is running in it; wait for its"
    " end or stop it, or use another workdir"
  )
