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
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from aquila_jax.core import errors

NAME = "lock"


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Holds a workdir for this process.

  With several processes the first holds it for all. A path that is no local
  directory has no lock; that is logged.

  Args:
    workdir: of a run; it must exist.

  Raises:
    errors.UserError: where another process holds it, naming that.
  """
  if "://" in os.fspath(workdir):
    logging.info("%s is not local: no lock keeps a second run out", workdir)
    yield
  elif jax.process_index() != 0:
    yield
  else:
    path = os.path.join(workdir, NAME)
    file = _acquire(path)
    try:
      yield
    finally:
      os.unlink(path)  # while it is held: see _acquire
      os.close(file)


def _acquire(path: str) -> int:
  """The descriptor of the lock file, which is held while it is open."""
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
