"""Shows where a run hangs: at a collective that waits, a disk, a lock.

The stacks are read through the interpreter, by a thread that holds its lock.
faulthandler walks threads that end meanwhile, and a run that is looked at often
can crash of it, with the lock (dump_traceback) and without
(dump_traceback_later).
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

from aquila_jax.core import process_watch

_DEEPEST = 200  # calls of a thread
_STDERR = 2  # not a Python stream: whoever holds its lock may be what hangs


def _stacks() -> str:
  """Of all threads, the innermost call first."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  lines = []
  for ident, frame in sys._current_frames().items():
    lines.append(f"Thread {names.get(ident, hex(ident))}, the last call first:")
    lines += (
      f'  File "{call.filename}", line {call.lineno} in {call.name}'
      for call in traceback.StackSummary.extract(
        traceback.walk_stack(frame), limit=_DEEPEST, lookup_lines=False
      )
    )
    lines.append("")
  return "\n".join(lines) + "\n"


class Watchdog:
  """Writes the stacks of all threads after every `silence_s` without a sign.

  A context manager. The run goes on; what to do is for people to decide.

  Args:
    silence_s: seconds; 0 is never.
  """

  def __init__(self, silence_s: float):
    self._silence_s = silence_s
    self._due = 0.0  # of time.monotonic()
    self._ended = threading.Event()
    self._thread: threading.Thread | None = None

  def rearm(self) -> None:
    """A sign of life: the silence begins anew."""
    self._due = time.monotonic() + self._silence_s

  def _watch(self) -> None:
    while not self._ended.wait(max(0.0, self._due - time.monotonic())):
      if time.monotonic() >= self._due:
        self._show()
        self.rearm()

  def _show(self) -> None:
    line = (
      f"\n{process_watch.prefix()}no step for {self._silence_s:g} s; the run"
      " goes on; its threads:"
    )
    os.write(_STDERR, f"{line}\n{_stacks()}".encode())

  def __enter__(self) -> Watchdog:
    self.rearm()
    if self._silence_s:
      self._thread = threading.Thread(
        target=self._watch, name="watchdog", daemon=True
      )
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    if self._thread is not None:
      self._thread.join()
