from __future__ import annotations

import json
import math
import resource

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2  # made by protobuf at run time

from aquila_jax.core import errors
from aquila_jax.training.metrics import (
  JsonlWriter,
  MetricsWriter,
  read_rows,
  scalars,
)


@pytest.fixture
def file(tmp_path):
  return epath.Path(tmp_path) / "metrics.jsonl"


def _write(file, rows, *, last_step=0):
  writer = JsonlWriter(file, last_step=last_step)
  for row in rows:
    writer.write(row)
  return writer


def test_a_row_is_on_disk_when_write_returns(file):
  writer = _write(file, [{"step": 1, "loss": 0.1}])
  assert file.read_text() == '{"step": 1, "loss": 0.1}\n'
  writer.close()


def test_rows_are_strict_json(file):
  row = {
    "step": np.int64(1),
    "nan": math.nan,
    "nested": {"inf": [np.float32(0.5), -math.inf]},
    "array": np.array([[1.0, np.nan]]),
    "text": "x",
    "nothing": None,
  }
  _write(file, [row]).close()

  def refuse(token):
    raise AssertionError(token)

  assert json.loads(file.read_text(), parse_constant=refuse) == {
    "step": 1,
    "nan": None,
    "nested": {"inf": [0.5, None]},
    "array": [[1.0, None]],
    "text": "x",
    "nothing": None,
  }


def test_later_rows_are_cut(file):
  _write(file, [{"step": s} for s in (2, 4, 6)]).close()
  _write(file, [{"step": 6, "again": True}], last_step=4).close()
  assert read_rows(file) == [
    {"step": 2},
    {"step": 4},
    {"step": 6, "again": True},
  ]


def test_a_torn_last_line_is_cut(file):
  _write(file, [{"step": s} for s in (2, 4)]).close()
  file.write_text(file.read_text() + '{"step": 6, "lo')
  assert read_rows(file) == [{"step": 2}, {"step": 4}]
  _write(file, [{"step": 6}], last_step=100).close()
  assert file.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6}\n'


def test_a_broken_line_in_the_middle_is_refused(file):
  file.write_text('{"step": 2}\n{"st\n{"step": 6}\n')
  with pytest.raises(errors.UserError) as error:
    read_rows(file)
  assert str(error.value) == (
    f"{file}:2: this line is not JSON; remove it to go on"
  )


def test_scalars_are_the_finite_numbers_by_name():
  row = {
    "step": 3,
    "text": "x",
    "missing": None,
    "bad": math.nan,
    "load": [[0.5, 0.25], [1.0, 0.0]],
    "epochs": {"wiki": 1.5},
  }
  assert scalars(row) == [
    ("step", 3.0),
    ("load/0/0", 0.5),
    ("load/0/1", 0.25),
    ("load/1/0", 1.0),
    ("load/1/1", 0.0),
    ("epochs/wiki", 1.5),
  ]


def _events(directory):
  """(step, tag, value) and purges, from the record format itself."""
  found = []
  for path in sorted(directory.iterdir()):
    data = path.read_bytes()
    while data:
      # A record: length (8 bytes), its CRC (4), the event, its CRC (4).
      length = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(  # pyright: ignore[reportAttributeAccessIssue]
        data[12 : 12 + length]
      )
      data = data[16 + length :]
      if event.HasField("session_log"):
        found.append(("purge", event.step))
      found += [
        (event.step, value.tag, value.simple_value)
        for value in event.summary.value
      ]
  return found


def test_tensorboard_has_the_scalars_and_purges_on_resumption(tmp_path):
  workdir = epath.Path(tmp_path)
  with MetricsWriter(workdir, last_step=0) as writer:
    writer.train({"step": 2, "loss": 0.5})
    writer.validation({"step": 2, "loss": 0.25})
    writer.train({"step": 4, "loss": 8.0})
  with MetricsWriter(workdir, last_step=2) as writer:
    writer.train({"step": 4, "loss": 2.0})
  assert read_rows(workdir / "metrics.jsonl") == [
    {"step": 2, "loss": 0.5},
    {"step": 4, "loss": 2.0},
  ]
  assert read_rows(workdir / "validation.jsonl") == [{"step": 2, "loss": 0.25}]
  events = _events(workdir / "tensorboard")
  assert sorted(map(str, events)) == sorted(
    map(
      str,
      [
        (2, "loss", 0.5),
        (2, "validation/loss", 0.25),
        (4, "loss", 8.0),
        ("purge", 3),
        (4, "loss", 2.0),
      ],
    )
  )


def test_rows_go_on_where_tensorboard_cannot_be_written(tmp_path, caplog):
  """Its thread must not die: then the eleventh event would wait for ever."""
  workdir = epath.Path(tmp_path)
  names = [f"metric_{i}" for i in range(8)]
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  with MetricsWriter(workdir, last_step=0) as writer:
    # An event is some 60 bytes, a number of a row some 15.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
      for step in range(1, 11):
        writer.train({"step": step} | {name: step for name in names})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert len(read_rows(workdir / "metrics.jsonl")) == 10
  (file,) = (workdir / "tensorboard").iterdir()
  assert 1000 < file.stat().length <= 2000
  said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert said == [
    f"{workdir}/tensorboard: File too large; its curves end here, rows of"
    " metrics go on"
  ]
