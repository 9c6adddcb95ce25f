"""A profile of a few steps, for TensorBoard's or XProf's trace viewer."""

from __future__ import annotations

import os
from typing import Any

import jax
from absl import logging
from etils import epath

from aquila_jax.core import errors


def check_profile_steps(
  steps: tuple[int, int] | None,
  *,
  total_steps: int,
  name: str = "profile_steps",
) -> None:
  """Refuses a range that is not within the stage.

  Args:
    steps: (start, stop), or None for no profile.
    total_steps: of the stage.
    name: of `steps`, for messages.

  Raises:
    errors.UserError: saying what would be.
  """
  if steps is not None and not 0 <= steps[0] < steps[1] <= total_steps:
    raise errors.UserError(
      f"{name}={steps}: expected 0 <= start < stop <= {total_steps}, the steps"
      " of the stage"
    )


class Profiler:
  """Traces the steps start <= step < stop, counted from 0. A context manager.

  Args:
    directory: of the trace.
    steps: (start, stop), or None for no trace.
    total_steps: of the stage.

  Raises:
    errors.UserError: where the range is not within the stage.
  """

  def __init__(
    self,
    directory: epath.Path,
    *,
    steps: tuple[int, int] | None,
    total_steps: int,
  ):
    check_profile_steps(steps, total_steps=total_steps)
    self._directory = directory
    self._start, self._stop = steps or (-1, -1)
    self._running = False

  def before(self, step: int) -> None:
    """Called with the number of the step about to run."""
    if step == self._start:
      jax.profiler.start_trace(os.fspath(self._directory))
      self._running = True

  def after(self, step: int, *, result: Any) -> None:
    """Called with the number of steps done, and what the last one made."""
    if self._running and step == self._stop:
      jax.block_until_ready(result)
      self._end()

  def _end(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      logging.info("wrote a profile to %s", self._directory)

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *_: object) -> None:
    self._end()
