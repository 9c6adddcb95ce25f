"""Rows of metrics: one strict JSON object a line, and TensorBoard events."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventsWriter

from aquila_jax.core import errors, files, processes

Row = dict[str, Any]


class JsonlWriter:
  """Appends rows to a .jsonl file; every row is on disk when `write` returns.

  Args:
    path: the file; made if missing.
    last_step: rows of later steps, and a last line torn by a kill, are cut from
      a file that is there.
  """

  def __init__(self, path: epath.Path, *, last_step: int):
    _cut(path, last_step=last_step)
    self._file = path.open("a")

  def write(self, row: Row) -> None:
    self._file.write(json.dumps(strict(row), allow_nan=False) + "\n")
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class _EventsFile:
  """TensorBoard's file, which ends where it cannot be written; the run goes on.

  tensorboardX writes in a thread of its own. An error would end that thread,
  and whoever has more events would wait for it for ever.

  Args:
    file: what tensorboardX writes to.
    directory: for the message.
  """

  def __init__(self, file: EventsWriter, directory: epath.Path):
    self._file, self._directory, self._ended = file, directory, False

  def write_event(self, event: Any) -> None:
    self._unless_ended(functools.partial(self._file.write_event, event))

  def flush(self) -> None:
    self._unless_ended(self._file.flush)

  def close(self) -> None:
    self._unless_ended(self._file.close)

  def _unless_ended(self, act: Callable[[], object]) -> None:
    if self._ended:
      return
    try:
      act()
    except OSError as error:
      self._ended = True
      logging.warning(
        "%s: %s; its curves end here, rows of metrics go on",
        *(self._directory, error.strerror),
      )


def _events(workdir: epath.Path, *, last_step: int) -> SummaryWriter:
  directory = workdir / "tensorboard"
  events = SummaryWriter(
    os.fspath(directory),
    # TensorBoard drops events from `purge_step` on that an earlier file has.
    purge_step=last_step + 1 if last_step else None,
    # Otherwise two starts in one second share a file.
    filename_suffix=f".{last_step}",
  )
  writer: Any = events.file_writer
  writer = writer.event_writer
  file = _EventsFile(writer._ev_writer, directory)
  writer._ev_writer = writer._worker._record_writer = file
  return events


class MetricsWriter:
  """The metrics of a workdir: .jsonl files, and TensorBoard.

  metrics.jsonl has the rows of logging steps, validation.jsonl those of
  validations, routing.jsonl those of checkpoints of a mixture; spikes.jsonl
  says what became of steps that got out of hand, and is never cut. A context
  manager.

  Args:
    workdir: of the stage.
    last_step: the step from which training goes on; later rows are cut.
  """

  def __init__(self, workdir: epath.Path, *, last_step: int):
    workdir.mkdir(parents=True, exist_ok=True)
    self._workdir = workdir
    self._open(last_step)

  def _open(self, last_step: int) -> None:
    workdir = self._workdir
    self._train = JsonlWriter(workdir / "metrics.jsonl", last_step=last_step)
    self._validation = JsonlWriter(
      workdir / "validation.jsonl", last_step=last_step
    )
    self._routing: JsonlWriter | None = None
    self._open_routing = functools.partial(
      JsonlWriter, workdir / "routing.jsonl", last_step=last_step
    )
    self._events = _events(workdir, last_step=last_step)

  def train(self, row: Row) -> None:
    """Writes the row of a logging step."""
    self._train.write(row)
    self._scalars(row)

  def validation(self, row: Row) -> None:
    """Writes the row of a validation."""
    self._validation.write(row)
    self._scalars(row, prefix="validation/")

  def routing(self, row: Row) -> None:
    """Writes the row of a checkpoint, of a mixture."""
    if self._routing is None:
      self._routing = self._open_routing()
    self._routing.write(row)
    self._scalars(row, prefix="routing/")

  def spike(self, row: Row) -> None:
    """Writes what became of a step that got out of hand."""
    with (self._workdir / "spikes.jsonl").open("a") as file:
      file.write(json.dumps(strict(row), allow_nan=False) + "\n")

  def rewind(self, step: int) -> None:
    """Cuts what is of later steps, as a new start from this one would."""
    self._close()
    self._open(step)

  def _scalars(self, row: Row, *, prefix: str = "") -> None:
    for name, value in scalars(row):
      if name != "step":
        self._events.add_scalar(prefix + name, value, row["step"])
    self._events.flush()

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self._close()

  def _close(self) -> None:
    self._train.close()
    self._validation.close()
    if self._routing is not None:
      self._routing.close()
    self._events.close()


class _NoMetrics(MetricsWriter):
  """Of a process that leaves it to the first."""

  def __init__(self):
    pass

  def train(self, row: Row) -> None:
    del row

  def validation(self, row: Row) -> None:
    del row

  def routing(self, row: Row) -> None:
    del row

  def spike(self, row: Row) -> None:
    del row

  def rewind(self, step: int) -> None:
    del step

  def __exit__(self, *_: object) -> None:
    pass


def metrics_writer(workdir: epath.Path, *, last_step: int) -> MetricsWriter:
  """A MetricsWriter in the first process; in others, one that writes nothing.

  Args:
    workdir: as of MetricsWriter.
    last_step: as of MetricsWriter.

  Returns:
    The writer.
  """
  if not processes.is_first():
    return _NoMetrics()
  return MetricsWriter(workdir, last_step=last_step)


def read_rows(path: epath.Path) -> list[Row]:
  """The rows of a .jsonl file; a last line that is torn is left out.

  Raises:
    errors.UserError: on a line that is no JSON object, other than the last.
  """
  rows = []
  lines = path.read_text().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError as error:
      if number == len(lines):
        break
      raise errors.UserError(
        f"{path}:{number}: this line is not JSON; remove it to go on"
      ) from error
    rows.append(row)
  return rows


def scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
  """The finite numbers of a row, nested ones as `name/0/1` and `name/key`."""
  found = []
  for name, value in row.items():
    if isinstance(value, list | tuple):
      value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, Mapping):
      found += [(f"{name}/{key}", number) for key, number in scalars(value)]
    elif isinstance(value, int | float) and math.isfinite(value):
      found.append((name, float(value)))
  return found


def _cut(path: epath.Path, *, last_step: int) -> None:
  if not path.exists():
    return
  kept = [row for row in read_rows(path) if row["step"] <= last_step]
  files.replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def strict(value: Any) -> Any:
  """Plain Python values; numbers that JSON has no token for become null."""
  if isinstance(value, Mapping):
    return {key: strict(item) for key, item in value.items()}
  if isinstance(value, list | tuple | np.ndarray):
    return [strict(item) for item in value]
  if isinstance(value, np.integer):
    return int(value)
  if isinstance(value, float | np.floating):
    return float(value) if math.isfinite(value) else None
  return value
