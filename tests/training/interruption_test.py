from __future__ import annotations

import os
import signal
import threading

import pytest

from aquila_jax.training.interruption import Interrupted, StopSignals


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_the_first_signal_is_noted_and_the_second_stops_at_once(number, capfd):
  before = signal.getsignal(number)
  with StopSignals() as signals:
    assert signals.received is None
    os.kill(os.getpid(), number)
    assert signals.received == number
    with pytest.raises(KeyboardInterrupt) as caught:
      os.kill(os.getpid(), number)
    assert caught.value.args == (number,)
  assert signal.getsignal(number) is before
  assert capfd.readouterr().err == (
    "\nfinishing the step and saving; once more stops at once\n"
  )


def test_outside_the_main_thread_nothing_is_installed():
  before = signal.getsignal(signal.SIGTERM)
  found = []

  def enter():
    with StopSignals():
      found.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert found == [before]


@pytest.mark.parametrize(
  "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_exit_code_and_message(number, code):
  error = Interrupted(7, signal_number=number)
  assert (error.step, error.exit_code) == (7, code)
  assert str(error) == (
    f"stopped by {number.name} after step 7, which is saved; the same command"
    " goes on from there"
  )
