from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.pipeline.workdir_lock import locked

# A run that is killed: the file stays, the lock does not.
_KILLED = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write('{"pid": 1, "host": "elsewhere"}')
file.flush()
print(flush=True)
sys.stdin.read()
"""


def _refusal(workdir: epath.Path, who: str) -> str:
  return (
    f"--workdir='{workdir}': {who} is running in it; wait for its end or stop"
    " it, or use another workdir"
  )


def test_a_second_run_is_refused_and_names_the_first(tmp_path):
  workdir = epath.Path(tmp_path)
  with locked(workdir):
    for _ in range(2):
      with pytest.raises(errors.UserError) as caught, locked(workdir):
        raise AssertionError("both run")
      who = f"process {os.getpid()} on {socket.gethostname()}"
      assert str(caught.value) == _refusal(workdir, who)
  assert list(tmp_path.iterdir()) == []
  with locked(workdir):
    pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EPERM, errno.EACCES])
def test_a_workdir_that_cannot_be_written_to_is_refused(
  tmp_path, monkeypatch, number
):
  """Root, as which tests may run, is refused by disks alone."""

  def refuse(path, *arguments):
    raise OSError(number, os.strerror(number), path)

  monkeypatch.setattr(os, "open", refuse)
  with pytest.raises(errors.UserError) as caught, locked(epath.Path(tmp_path)):
    raise AssertionError("it runs")
  assert str(caught.value) == (
    f"--workdir='{tmp_path}': cannot be written to: {os.strerror(number)}"
  )


def test_the_lock_dies_with_its_process(tmp_path):
  workdir = epath.Path(tmp_path)
  with subprocess.Popen(
    [sys.executable, "-c", _KILLED, tmp_path / "lock"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as other:
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(errors.UserError) as caught, locked(workdir):
      raise AssertionError("both run")
    assert str(caught.value) == _refusal(workdir, "process 1 on elsewhere")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "lock").exists()
    with locked(workdir):
      pass


def test_a_run_that_fails_gives_its_lock_back(tmp_path):
  workdir = epath.Path(tmp_path)
  with pytest.raises(RuntimeError), locked(workdir):
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []


def test_what_is_not_local_has_no_lock(caplog):
  with caplog.at_level(logging.INFO, logger="absl"):
    with locked(epath.Path("gs://bucket/run")):
      pass
  assert [record.getMessage() for record in caplog.records] == [
    "gs://bucket/run is not local: no lock keeps a second run out"
  ]
