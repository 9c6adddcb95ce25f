"""Ticks, ranges, labels that keep apart, and pixels that decode."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import numpy as np
import pytest

from aquila_jax.evaluation import svg


@pytest.mark.parametrize(
  ("low", "high", "count", "ticks"),
  [
    (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
    (3.4, 7.1, 4, [4, 5, 6, 7]),
    (0.0, 0.0047, 5, [0, 0.001, 0.002, 0.003, 0.004]),
    (5.0, 5.0, 5, [5.0]),
  ],
)
def test_ticks_are_round_and_inside(low, high, count, ticks):
  assert svg.round_ticks(low, high, count=count) == pytest.approx(ticks)


def test_tick_labels_are_in_units_with_the_digits_they_need():
  axis = svg.Axis(label="", low=0.0, high=2e12, divide=1e12)
  places, labels = zip(*axis.ticks(4), strict=True)
  assert places == pytest.approx([0.0, 5e11, 1e12, 1.5e12, 2e12])
  assert labels == ("0.0", "0.5", "1.0", "1.5", "2.0")
  share = svg.Axis(label="", low=0.0, high=0.5, percent=True)
  assert [label for _, label in share.ticks(5)] == [
    "0%",
    "10%",
    "20%",
    "30%",
    "40%",
    "50%",
  ]


def test_spans_are_never_empty():
  assert svg.span([]) == (0.0, 1.0)
  low, high = svg.span([3.0, 3.0])
  assert low < 3.0 < high
  assert svg.span([2.0, 4.0], zero=True) == pytest.approx((0.0, 4.2))
  low, high = svg.span([0.0])
  assert low < high


def chart() -> svg.Chart:
  return svg.Chart(
    x=svg.Axis(label="x", low=0.0, high=10.0),
    y=svg.Axis(label="y", low=0.0, high=1.0),
    width=680,
    height=260,
  )


def test_points_stand_where_the_axes_say():
  # 680 - 66 - 14 = 600 wide, 260 - 46 - 14 = 200 high; y points down.
  plot = chart()
  plot.line([(0.0, 0.0), (5.0, 0.5), (10.0, 1.0)], "efficient")
  assert 'd="M0.0 200.0L300.0 100.0L600.0 0.0"' in plot.render("a plot")


def test_labels_of_near_verticals_stand_in_different_rows():
  plot = chart()
  for x in (5.0, 5.1, 9.9):
    plot.vertical(x, "scale out, sparse upcycling")
  drawn = plot.render("a plot")
  found = re.findall(
    r'<text x="([\d.]+)" y="(-\d+)"[^>]*>scale out, sparse', drawn
  )
  width = svg.text_width("scale out, sparse upcycling")
  boxes = [(float(x), float(x) + width, int(y)) for x, y in found]
  assert len(boxes) == 3
  assert all(end <= 600 for _, end, _ in boxes)
  for i, (start, end, row) in enumerate(boxes):
    for other_start, other_end, other_row in boxes[i + 1 :]:
      apart = end <= other_start or other_end <= start
      assert apart or row != other_row


def test_ideographs_are_wider_than_letters():
  assert svg.text_width("实例") == svg.text_width("abcd")


def test_pixels_decode_to_the_same_colours():
  colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
  uri = svg.pixels(colours)
  prefix = "data:image/png;base64,"
  assert uri.startswith(prefix)
  png = base64.b64decode(uri.removeprefix(prefix))
  assert png[:8] == b"\x89PNG\r\n\x1a\n"
  chunks, place = {}, 8
  while place < len(png):
    (size,) = struct.unpack(">I", png[place : place + 4])
    kind, data = png[place + 4 : place + 8], png[place + 8 : place + 8 + size]
    (checksum,) = struct.unpack(">I", png[place + 8 + size : place + 12 + size])
    assert checksum == zlib.crc32(kind + data)
    chunks[kind] = data
    place += 12 + size
  assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
  lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
  lines = lines.reshape(2, 10)
  assert (lines[:, 0] == 0).all()
  assert (lines[:, 1:].reshape(2, 3, 3) == colours).all()


def test_the_middle_of_the_map_is_neutral_and_its_ends_are_not():
  low, middle, high = svg.map_colours(np.asarray([0.0, 0.5, 1.0])).astype(int)
  assert np.ptp(middle) < 10
  assert low[2] - low[0] > 80  # blue
  assert high[0] - high[2] > 80  # orange
