"""Progress for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich import progress
from rich.console import Console

from aquila_jax.training.metrics import Row


class Reporter:
  """Shows stage, step, loss, tokens a second and time left.

  A context manager.

  Args:
    stage: the name to show.
    total_steps: of the stage.
    step: from which training goes on.
    console: where to; by default standard error.
    is_silent: shows nothing.
  """

  def __init__(
    self,
    stage: str,
    *,
    total_steps: int,
    step: int = 0,
    console: Console | None = None,
    is_silent: bool = False,
  ):
    self._stage = stage
    self._total = total_steps
    self._console = console or Console(stderr=True, quiet=is_silent)
    self._first = (step, time.perf_counter())
    self._bar = None
    if self._console.is_terminal and not is_silent:
      self._bar = progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[numbers]}"),
        progress.TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task(
        stage, total=total_steps, completed=step, numbers=""
      )

  def advance(self, step: int) -> None:
    """Notes that `step` steps are done."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def show(self, row: Row) -> None:
    """Shows the row of a logging step."""
    numbers = (
      f"loss {_number(row['loss'])}  {row['tokens_per_s']:,.0f} tokens/s"
    )
    if self._bar is not None:
      self._bar.update(self._task, completed=row["step"], numbers=numbers)
      return
    self.note(
      f"step {row['step']}/{self._total}  {numbers}"
      f"  {duration(self._seconds_left(row['step']))} left"
    )

  def show_validation(self, step: int, *, loss: float) -> None:
    """Shows the loss of a validation."""
    self.note(f"step {step}/{self._total}  validation loss {_number(loss)}")

  def note(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    self._console.print(
      f"{self._stage}: {text}", markup=False, highlight=False, soft_wrap=True
    )

  def _seconds_left(self, step: int) -> float:
    first_step, started = self._first
    if step <= first_step:
      return 0.0
    seconds = time.perf_counter() - started
    return (self._total - step) * seconds / (step - first_step)

  def __enter__(self) -> Reporter:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._bar is not None:
      self._bar.stop()


def duration(seconds: float) -> str:
  """`1:02:03`, or `2:03` below an hour."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{rest:02d}"
  return f"{minutes}:{rest:02d}"


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.4f}"
