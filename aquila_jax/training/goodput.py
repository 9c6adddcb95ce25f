"""Where the wall time of a stage goes, and how much of it trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

# The host's time. "steps" is dispatching them and waiting for the device;
# "saving" what of it blocks; "restore" verifies checkpoints too.
Part = Literal[
  "steps", "compile", "restore", "data_wait", "validation", "saving", "other"
]
PARTS: tuple[Part, ...] = get_args(Part)


class Goodput:
  """Divides wall time into parts: every instant belongs to exactly one.

  So they sum to the time since this was made, and that of earlier starts.
  """

  def __init__(self):
    self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    self._part: Part = "other"
    self._since = time.perf_counter()

  def add(self, seconds: Mapping[str, float]) -> None:
    """Adds what earlier starts took, as `seconds` said."""
    for part in PARTS:
      self._seconds[part] += seconds.get(part, 0.0)

  @contextlib.contextmanager
  def spent(self, part: Part) -> Iterator[None]:
    """Time inside is of `part`, and of no part around it."""
    outer = self._switch(part)
    try:
      yield
    finally:
      self._switch(outer)

  @property
  def seconds(self) -> dict[str, float]:
    """Of every part, up to now."""
    self._switch(self._part)
    return {part: self._seconds[part] for part in PARTS}

  def _switch(self, part: Part) -> Part:
    now, before = time.perf_counter(), self._part
    self._seconds[before] += now - self._since
    self._part, self._since = part, now
    return before


def in_words(seconds: Mapping[str, float]) -> str:
  """`62.1 % of 80.3 s in steps; compile 20.4 %, ...`, the rest by size."""
  total = sum(seconds.values()) or 1.0
  rest = sorted(
    ((name, value) for name, value in seconds.items() if name != "steps"),
    key=lambda item: -item[1],
  )
  listed = ", ".join(
    f"{name.replace('_', ' ')} {100 * value / total:.1f} %"
    for name, value in rest
  )
  steps = 100 * seconds["steps"] / total
  return f"{steps:.1f} % of {total:.1f} s in steps; {listed}"
