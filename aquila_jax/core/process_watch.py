"""How several processes begin, and how all end when one of them does.

Each process says every second that it is there; process 0 listens. A process
that is silent for `lost_after_s`, or says that it has failed, ends the job:
every other one says so in a line and ends, wherever it stands. No collective is
waited for.

jax has heartbeats of its own, which abort a process. They wait longer than we
do, but for one case: when process 0 is gone, its connections are closed, and
jax aborts the others at once. `_Abort` says then what has happened.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import jax
from absl import logging

from aquila_jax.core import errors, processes
from aquila_jax.core.process_settings import Settings

LOST = 5  # the exit code where a process of the job is gone

_PROGRAM = "aquila_jax"
_STDERR = 2  # not a Python stream: whoever holds its lock may hang
_PREFIX = "aquila_jax/watch"
_PROBE_S = 5.0
# For a process that ends in the same way as the one that it hears of.
_GRACE_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """Why a job ends."""

  process: int
  code: int  # the exit code of all
  message: str


def join(
  settings: Settings, *, join_timeout_s: float, lost_after_s: float
) -> Watch:
  """Connects this process to the others, before any device is touched.

  Args:
    settings: of `find_settings`.
    join_timeout_s: how long to wait for the others.
    lost_after_s: the silence after which a process is taken for lost.

  Returns:
    The watch, which runs.

  Raises:
    errors.UserError: where process 0 does not answer, or cannot listen.
  """
  _check_reachable(settings, timeout_s=join_timeout_s)
  # It would take SIGTERM for itself; StopSignals has it.
  jax.config.update("jax_enable_preemption_service", False)
  abort = _Abort()
  abort.explain = lambda: Verdict(
    process=settings.process_id,
    code=2,
    message=(
      f"--coordinator={settings.coordinator}: not all of"
      f" {settings.num_processes} processes have come within"
      f" {join_timeout_s:g} s"
    ),
  )
  jax.distributed.initialize(
    coordinator_address=settings.coordinator,
    num_processes=settings.num_processes,
    process_id=settings.process_id,
    cluster_detection_method=settings.cluster or "deactivate",
    initialization_timeout=int(join_timeout_s),
    # The last resort, where a thread of Python could not run.
    heartbeat_timeout_seconds=int(2 * lost_after_s) + 10,
  )
  abort.explain = lambda: _lost_first(settings)
  return Watch(settings, lost_after_s=lost_after_s, abort=abort)


def _check_reachable(settings: Settings, *, timeout_s: float) -> None:
  """Waits for process 0 to listen; jax would abort where it does not.

  Raises:
    errors.UserError: after `timeout_s`.
  """
  if settings.is_first:
    _check_free(settings)
    return
  deadline = time.monotonic() + timeout_s
  while True:
    reason = _why_unreachable(settings)
    if reason is None:
      return
    if time.monotonic() > deadline:
      raise errors.UserError(
        f"--coordinator={settings.coordinator}: process 0 does not answer,"
        f" {timeout_s:g} s long ({reason}); has it started, and can this host"
        " reach it?"
      )
    time.sleep(0.2)


def _check_free(settings: Settings) -> None:
  port = settings.address[1]
  try:
    with socket.create_server(("", port)):
      pass
  except OSError as error:
    raise errors.UserError(
      f"--coordinator={settings.coordinator}: process 0 cannot listen on port"
      f" {port}: {os.strerror(error.errno or 0)}"
    ) from error


def _why_unreachable(settings: Settings) -> str | None:
  try:
    socket.create_connection(settings.address, timeout=_PROBE_S).close()
  except OSError as error:
    return error.strerror or str(error)
  return None


def _lost_first(settings: Settings) -> Verdict | None:
  """Of a process that jax aborts: whether process 0 is gone."""
  if settings.is_first or _why_unreachable(settings) is None:
    return None
  return _lost(0, f"its address {settings.coordinator} does not answer")


def _lost(process: int, how: str) -> Verdict:
  return Verdict(
    process=process,
    code=LOST,
    message=(
      f"process {process} of the job is lost: {how}; the same command goes on"
      " from the last checkpoint"
    ),
  )


class Watch:
  """Ends this process when another one has ended, and tells of its own end.

  Args:
    settings: of the job.
    lost_after_s: the silence after which a process is taken for lost.
    abort: what is said when jax aborts.
  """

  def __init__(self, settings: Settings, *, lost_after_s: float, abort: _Abort):
    self._settings = settings
    self._lost_after_s = lost_after_s
    self._every_s = min(1.0, lost_after_s / 10)
    self._abort = abort  # which C calls
    self._client = processes.client()
    self._closed = threading.Event()
    self._verdict: Verdict | None = None
    self._answered = time.monotonic()
    self._threads = [
      threading.Thread(target=target, name=target.__name__, daemon=True)
      for target in (self._talk, self._judge)
    ]
    for thread in self._threads:
      thread.start()

  def _talk(self) -> None:
    """Says that this process is there, and hears of the others."""
    seen: dict[str, tuple[str, float]] = {}
    number = 0
    while not self._closed.wait(self._every_s):
      number += 1
      try:
        self._set("alive", str(number))
        verdict = (
          self._listen(seen) if self._settings.is_first else self._hear()
        )
      except jax.errors.JaxRuntimeError as error:
        # The service is gone: jax aborts, or _judge finds the silence.
        logging.log_first_n(logging.WARNING, "%s", 1, error)
        continue
      self._answered = time.monotonic()
      if verdict is not None:
        self._verdict = verdict
        return

  def _listen(self, seen: dict[str, tuple[str, float]]) -> Verdict | None:
    """Process 0: who has ended, or is silent."""
    found = dict(self._client.key_value_dir_get(f"{_PREFIX}/ended/"))
    for value in found.values():
      return self._pronounce(Verdict(**json.loads(value)))
    now = time.monotonic()
    alive = dict(self._client.key_value_dir_get(f"{_PREFIX}/alive/"))
    for process in range(self._settings.num_processes):
      key = f"{_PREFIX}/alive/{process}"
      said, since = seen.get(key, ("", now))
      if alive.get(key, "") != said or key not in seen:
        seen[key] = (alive.get(key, ""), now)
      elif now - since > self._lost_after_s:
        how = f"it is silent for {self._lost_after_s:g} s"
        return self._pronounce(_lost(process, how))
    return None

  def _pronounce(self, verdict: Verdict) -> Verdict:
    """Tells all, and gives them the time to hear it."""
    self._set("verdict", json.dumps(dataclasses.asdict(verdict)))
    self._closed.wait(2 * self._every_s + 0.5)
    return verdict

  def _hear(self) -> Verdict | None:
    found = dict(self._client.key_value_dir_get(f"{_PREFIX}/verdict/"))
    for value in found.values():
      return Verdict(**json.loads(value))
    return None

  def _judge(self) -> None:
    """Ends the process; another thread may wait for an answer for ever."""
    while not self._closed.wait(self._every_s / 2):
      verdict = self._verdict
      silence = time.monotonic() - self._answered
      if verdict is None and silence > self._lost_after_s:
        verdict = _lost(0, f"it is silent for {self._lost_after_s:g} s")
      if verdict is None or verdict.process == self._settings.process_id:
        continue
      if verdict.code == LOST or not self._closed.wait(_GRACE_S):
        end(verdict)

  def _set(self, kind: str, value: str) -> None:
    key = f"{_PREFIX}/{kind}/{self._settings.process_id}"
    self._client.key_value_set(key, value, allow_overwrite=True)

  def await_verdict(self) -> None:
    """Ends the process if another one is lost; returns if none is.

    For an error that may come of that: a collective that lost its peer.
    """
    self._closed.wait(self._lost_after_s + 4 * self._every_s)

  def fail(self, code: int, message: str) -> None:
    """Tells the others that this process ends, and why; then it must end."""
    self._closed.set()
    verdict = Verdict(
      process=self._settings.process_id,
      code=code,
      message=f"process {self._settings.process_id} has ended: {message}",
    )
    text = json.dumps(dataclasses.asdict(verdict))
    try:
      self._set("verdict" if self._settings.is_first else "ended", text)
      if self._settings.is_first:
        time.sleep(2 * self._every_s + 0.5)  # they must hear it from us
    except jax.errors.JaxRuntimeError:
      pass  # there is nobody to tell

  def leave(self) -> None:
    """Waits for all to be done, and disconnects."""
    processes.barrier("done")
    self._closed.set()
    for thread in self._threads:
      thread.join()
    jax.distributed.shutdown()


def end(verdict: Verdict) -> None:
  """Ends this process now, whatever its threads do."""
  line = f"{_PROGRAM}: {prefix()}{verdict.message}\n"
  os.write(_STDERR, line.encode())
  os._exit(verdict.code)


def prefix() -> str:
  """In front of what other processes than the first say."""
  return "" if processes.is_first() else f"process {processes.index()}: "


class _Abort:
  """Says a line where C++ aborts the process, and ends it with a code.

  Python's own handlers run too late for that.

  Attributes:
    explain: what to end with; None leaves the abort as it is.
  """

  def __init__(self):
    self.explain: Callable[[], Verdict | None] = lambda: None
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    self._handler = kind(self._on_abort)  # C holds no reference
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(
      int(signal.SIGABRT), ctypes.cast(self._handler, ctypes.c_void_p)
    )

  def _on_abort(self, number: int) -> None:
    del number
    verdict = self.explain()
    if verdict is None:
      faulthandler.dump_traceback(_STDERR, all_threads=True)
      line = (
        f"{_PROGRAM}: {prefix()}aborted by jax or XLA, which say why above; a"
        " process that was lost, or has come twice, is one reason\n"
      )
      os.write(_STDERR, line.encode())
    else:
      end(verdict)
