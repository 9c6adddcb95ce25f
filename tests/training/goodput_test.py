from __future__ import annotations

import pytest

from aquila_jax.training import goodput


class _Time:
  """A clock that a test turns on."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch) -> _Time:
  clock = _Time()
  monkeypatch.setattr(goodput, "time", clock)
  return clock


def test_every_instant_belongs_to_the_innermost_part(clock):
  spent = goodput.Goodput()
  clock.now += 1  # other
  with spent.spent("compile"):
    clock.now += 2
  with spent.spent("validation"):
    clock.now += 4
    with spent.spent("steps"):
      clock.now += 8
    clock.now += 16
  with pytest.raises(RuntimeError), spent.spent("saving"):
    clock.now += 32
    raise RuntimeError
  clock.now += 64  # other
  expected = dict.fromkeys(goodput.PARTS, 0.0) | {
    "steps": 8.0,
    "compile": 2.0,
    "validation": 20.0,
    "saving": 32.0,
    "other": 65.0,
  }
  assert spent.seconds == expected
  assert sum(spent.seconds.values()) == clock.now - 100.0
  # Asked in the middle of a part, and with what earlier starts took.
  with spent.spent("data_wait"):
    clock.now += 128
    assert spent.seconds == expected | {"data_wait": 128.0}
  spent.add({"steps": 0.5, "of_a_later_version": 9.0})
  assert spent.seconds["steps"] == 8.5


def test_in_words_it_names_the_largest_loss_first():
  seconds: dict[str, float] = {part: 0.0 for part in goodput.PARTS}
  seconds |= {"steps": 6.0, "compile": 1.0, "data_wait": 3.0}
  assert goodput.in_words(seconds) == (
    "60.0 % of 10.0 s in steps; data wait 30.0 %, compile 10.0 %, restore"
    " 0.0 %, validation 0.0 %, saving 0.0 %, other 0.0 %"
  )
