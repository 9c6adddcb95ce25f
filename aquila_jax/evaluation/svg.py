"""Charts as inline SVG that takes its colours from the page's style sheet.

Drawn here and not by a plotting library so that one figure reads in light and
dark mode and on paper, scales with the page, and has no font in it.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import struct
import unicodedata
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from aquila_jax.evaluation.formats import Number
from aquila_jax.evaluation.markup import Markup, element, join

XY = tuple[Number, Number]

_LEFT, _RIGHT, _BOTTOM, _TOP = 66, 14, 46, 14  # margins, in units of the view
_LANE = 15  # height of a row of labels above the plot
_FONT = 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """An axis: its range and how it is labelled."""

  label: str
  low: Number
  high: Number
  divide: Number = 1.0  # tick labels are in units of this
  percent: bool = False

  def ticks(self, count: int) -> list[tuple[float, str]]:
    """About `count` round values of the range, with their labels."""
    scale = self.divide / 100 if self.percent else self.divide
    values = round_ticks(self.low / scale, self.high / scale, count=count)
    step = values[1] - values[0] if len(values) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    unit = "%" if self.percent else ""
    return [(v * scale, f"{v:,.{digits}f}{unit}") for v in values]


def round_ticks(low: Number, high: Number, *, count: int) -> list[float]:
  """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def span(values: Sequence[Number], *, zero: bool = False) -> XY:
  """A range that holds `values` with a little room, never empty."""
  if not values:
    return (0.0, 1.0)
  low, high = min(values), max(values)
  if zero:
    low = min(low, 0.0)
  room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
  return (low if zero and low == 0 else low - room, high + room)


def text_width(label: str, *, font: Number = _FONT) -> float:
  """About how wide a label is; ideographs count as two letters."""
  wide = sum(unicodedata.east_asian_width(c) in "WF" for c in label)
  return 0.56 * font * (len(label) + wide)


class Chart:
  """A plot of lines and marks over two axes; `render` gives the element.

  Colours and strokes are classes of the page's style sheet. What leaves the
  plot area is cut off.

  Args:
    x: the horizontal axis.
    y: the vertical axis.
    width: of the view; the page scales it to the column.
    height: of the plot area with the margins.
  """

  def __init__(
    self, *, x: Axis, y: Axis, width: Number = 760, height: Number = 330
  ):
    self._x, self._y = x, y
    self._width, self._height = width, height
    self._inside: list[Markup] = []
    self._verticals: list[tuple[Number, str]] = []
    self._levels: list[tuple[Number, str]] = []

  @property
  def _plot(self) -> XY:
    """Width and height of the plot area."""
    return (
      self._width - _LEFT - _RIGHT,
      self._height - _BOTTOM - _TOP,
    )

  def _at(self, x: Number, y: Number) -> XY:
    width, height = self._plot
    return (
      width * (x - self._x.low) / (self._x.high - self._x.low),
      height * (1 - (y - self._y.low) / (self._y.high - self._y.low)),
    )

  def line(self, points: Sequence[XY], style: str) -> None:
    """Straight lines from point to point."""
    if not points:
      return
    path = "L".join(
      "{:.1f} {:.1f}".format(*self._at(*point)) for point in points
    )
    self._inside.append(element("path", d=f"M{path}", class_=f"line {style}"))

  def dots(
    self, points: Sequence[XY], style: str, *, titles: Sequence[str]
  ) -> None:
    """Marks that say their `title` under the pointer."""
    for point, title in zip(points, titles, strict=True):
      x, y = self._at(*point)
      self._inside.append(
        element(
          "circle",
          element("title", title),
          cx=f"{x:.1f}",
          cy=f"{y:.1f}",
          r=3,
          class_=f"dot {style}",
        )
      )

  def jump(self, x: Number, values: XY, *, title: str) -> None:
    """A dotted line between two values at one place, a diamond on the last."""
    (left, top), (_, bottom) = self._at(x, values[0]), self._at(x, values[1])
    self._inside.append(
      element(
        "g",
        element("title", title),
        element(
          "path", d=f"M{left:.1f} {top:.1f}V{bottom:.1f}", class_="line jump"
        ),
        element(
          "path",
          d=f"M{left:.1f} {bottom - 5:.1f}l5 5l-5 5l-5 -5z",
          class_="dot jump",
        ),
      )
    )

  def vertical(self, x: Number, label: str) -> None:
    """A line across the plot, labelled above it."""
    self._verticals.append((x, label))

  def level(self, y: Number, label: str) -> None:
    """A horizontal line, labelled on the left."""
    self._levels.append((y, label))

  def render(self, description: str) -> Markup:
    """The SVG element; `description` is for those who cannot see it."""
    lanes, above = self._labels_above()
    top = _TOP + _LANE * lanes
    width, height = self._plot
    area = element(
      "svg",
      *(self._vertical_line(x) for x, _ in self._verticals),
      *(self._level_line(y) for y, _ in self._levels),
      *self._inside,
      *(self._level_label(y, label) for y, label in self._levels),
      width=width,
      height=height,
    )
    total = self._height + _LANE * lanes
    return element(
      "svg",
      element("title", description),
      element(
        "g", self._grid(), area, above, transform=f"translate({_LEFT},{top})"
      ),
      viewBox=f"0 0 {self._width:g} {total:g}",
      role="img",
      class_="chart",
    )

  def _grid(self) -> Markup:
    width, height = self._plot
    parts = []
    for value, label in self._y.ticks(max(3, round(height / 50))):
      y = f"{self._at(self._x.low, value)[1]:.1f}"
      parts.append(element("path", d=f"M0 {y}H{width:g}", class_="grid"))
      parts.append(_label(label, x=-8, y=y, anchor="end", shift="0.35em"))
    for value, label in self._x.ticks(max(3, round(width / 110))):
      x = f"{self._at(value, self._y.low)[0]:.1f}"
      parts.append(element("path", d=f"M{x} {height:g}v5", class_="axis"))
      parts.append(_label(label, x=x, y=height + 18, anchor="middle"))
    parts.append(element("path", d=f"M0 {height:g}H{width:g}", class_="axis"))
    parts.append(
      _label(
        self._x.label,
        x=width / 2,
        y=height + 38,
        anchor="middle",
        style="label name",
      )
    )
    parts.append(
      element(
        "text",
        self._y.label,
        transform=f"translate(-54 {height / 2:g}) rotate(-90)",
        text_anchor="middle",
        class_="label name",
      )
    )
    return join(parts)

  def _vertical_line(self, x: Number) -> Markup:
    left = self._at(x, self._y.low)[0]
    height = self._plot[1]
    return element("path", d=f"M{left:.1f} 0V{height:g}", class_="vertical")

  def _level_line(self, y: Number) -> Markup:
    top = self._at(self._x.low, y)[1]
    return element("path", d=f"M0 {top:.1f}H{self._plot[0]:g}", class_="level")

  def _level_label(self, y: Number, label: str) -> Markup:
    top = self._at(self._x.low, y)[1]
    return _label(label, x=6, y=f"{top + 14:.1f}", anchor="start")

  def _labels_above(self) -> tuple[int, Markup]:
    """Labels of the verticals, in as many rows as keeps them apart."""
    width = self._plot[0]
    ends: list[float] = []  # of the last label of every row
    placed = []
    for x, label in sorted(self._verticals):
      left = self._at(x, self._y.low)[0]
      size = text_width(label) + 8
      start = max(0.0, min(left - 2, width - size))
      row = next((i for i, end in enumerate(ends) if end <= start), len(ends))
      ends[row:] = [start + size, *ends[row + 1 :]]
      y = -6 - _LANE * row
      placed.append(_label(label, x=f"{start:.1f}", y=y, anchor="start"))
      placed.append(
        element("path", d=f"M{left:.1f} 0V{y + 3}", class_="vertical")
      )
    return len(ends), join(placed)


def _label(
  content: str,
  *,
  x: object,
  y: object,
  anchor: str,
  shift: str | None = None,
  style: str = "label",
) -> Markup:
  return element(
    "text", content, x=x, y=y, text_anchor=anchor, dy=shift, class_=style
  )


def bars(
  groups: Sequence[tuple[str, Sequence[tuple[str, Number, str]]]],
  *,
  axis: Axis,
  number: Callable[[float], str],
  description: str,
) -> Markup:
  """Horizontal bars in groups, each with its value behind it.

  Args:
    groups: title and bars of each; a bar is its label, value and style class.
    axis: of the values; it begins at 0.
    number: writes a value.
    description: for those who cannot see it.

  Returns:
    The SVG element.
  """
  labels = [label for _, rows in groups for label, _, _ in rows]
  left = max(map(text_width, labels), default=0) + 16
  width = 760 - left - 70
  y, parts = 4.0, []
  for title, rows in groups:
    y += 18
    parts.append(_label(title, x=0, y=y, anchor="start", style="label strong"))
    y += 9
    for label, value, style in rows:
      length = max(1.0, width * (value - axis.low) / (axis.high - axis.low))
      parts += [
        _label(label, x=left - 8, y=y + 14, anchor="end"),
        element(
          "rect",
          x=left,
          y=y + 2,
          width=f"{length:.1f}",
          height=16,
          class_=f"bar {style}",
        ),
        _label(number(value), x=left + length + 6, y=y + 14, anchor="start"),
      ]
      y += 21
    y += 4
  parts.append(
    _label(axis.label, x=left, y=y + 16, anchor="start", style="label name")
  )
  return element(
    "svg",
    element("title", description),
    *parts,
    viewBox=f"0 0 760 {y + 24:g}",
    role="img",
    class_="chart",
  )


# Blue below, light grey at, orange above the even share; told apart also by
# those who do not see red or green.
_MAP = np.asarray(
  [(8, 61, 119), (98, 152, 205), (236, 234, 229), (235, 149, 62), (150, 60, 4)],
  np.float64,
)


def map_colours(shares: np.ndarray) -> np.ndarray:
  """RGB of each share in [0, 1]; 1/2 is the neutral middle."""
  knots = np.linspace(0.0, 1.0, len(_MAP))
  channels = [np.interp(shares, knots, _MAP[:, c]) for c in range(3)]
  return np.stack(channels, axis=-1).round().astype(np.uint8)


def pixels(colours: np.ndarray) -> str:
  """A data URI of a PNG with these RGB pixels, uint8 [height, width, 3]."""
  height, width, _ = colours.shape
  # Each line begins with its filter, 0: none.
  lines = np.pad(colours.reshape(height, -1), ((0, 0), (1, 0)))

  def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return (
      struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    )

  # Eight bits a channel, RGB; no interlacing.
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  png = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    + chunk(b"IEND", b"")
  )
  return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
