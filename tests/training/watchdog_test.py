from __future__ import annotations

import time

from aquila_jax.training.watchdog import Watchdog


def _hang(seconds):
  time.sleep(seconds)


def test_silence_shows_where_every_thread_stands_again_and_again(capfd):
  with Watchdog(0.1) as watchdog:
    _hang(0.35)
    watchdog.rearm()
  shown = capfd.readouterr().err
  line = "no step for 0.1 s; the run goes on; its threads:\n"
  assert shown.count(line) >= 2
  assert "in _hang" in shown


def test_signs_of_life_keep_it_quiet(capfd):
  with Watchdog(2.0) as watchdog:
    for _ in range(5):
      _hang(0.5)
      watchdog.rearm()
  _hang(0.1)
  assert capfd.readouterr().err == ""


def test_after_its_end_and_with_0_it_says_nothing(capfd):
  with Watchdog(0.2):
    pass
  with Watchdog(0.0) as off:
    off.rearm()
    _hang(0.4)
  assert capfd.readouterr().err == ""


def _deep(depth):
  return [] if depth == 0 else [*_deep(depth - 1), depth]


def test_a_run_that_is_busy_survives_it(capfd):
  """It may be slow and not hang: its stacks change while they are read."""
  end = time.monotonic() + 1
  with Watchdog(0.001):
    while time.monotonic() < end:
      assert len(_deep(50)) == 50
  assert capfd.readouterr().err.count("no step for 0.001 s") > 10
