"""SIGTERM, Ctrl-C, a closed terminal: finish the step, save, leave.

A second signal stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):
  """Training was stopped from outside, after it had saved.

  Attributes:
    step: the step that was saved.
    signal_number: what stopped it.
  """

  def __init__(self, step: int, *, signal_number: int):
    name = signal.Signals(signal_number).name
    super().__init__(
      f"stopped by {name} after step {step}, which is saved; the same command"
      " goes on from there"
    )
    self.step = step
    self.signal_number = signal_number

  @property
  def exit_code(self) -> int:
    """What shells expect of a process that a signal ended."""
    return 128 + self.signal_number


class StopSignals:
  """Notes SIGTERM, SIGINT and SIGHUP while it is entered. A context manager.

  The first is noted in `received`, a second raises
  KeyboardInterrupt(number). Outside
  the main thread, where Python takes no signals, nothing is ever received.
  """

  def __init__(self):
    self.received: int | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> StopSignals:
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

  def _receive(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.received is not None:
      raise KeyboardInterrupt(number)
    self.received = number
    # Not through a buffered stream: the handler may stand inside its write.
    os.write(2, b"\nfinishing the step and saving; once more stops at once\n")
