"""Heat maps: one over the whole width, or small ones beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from aquila_jax.evaluation import svg
from aquila_jax.evaluation.formats import Number
from aquila_jax.evaluation.markup import Markup, element, join

_WIDTH = 760
_COSINE_DIGITS = 3
_DARK, _LIGHT = "#1b2330", "#ffffff"  # of numbers on a cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
  """From values to colours, and what stands beside the bar that shows them."""

  to_share: Callable[[np.ndarray], np.ndarray]  # 0 to 1; 1/2 is neutral
  ticks: tuple[tuple[float, str], ...]
  unit: str
  digits: int  # of a number in a cell
  whole: bool = True  # whether values lie on both sides of the neutral one

  def number(self, value: Number) -> str:
    """As in a cell; nothing where there is none."""
    return _number(value, self.digits)


def cosine(value: Number) -> str:
  """A cosine as the maps write it."""
  return _number(value, _COSINE_DIGITS)


def _number(value: Number, digits: int) -> str:
  if not np.isfinite(value):
    return ""
  return f"{value:.{digits}f}".replace("-", "−")


def _ratio(unit: str) -> Scale:
  """Of what is 1 when nothing is special: 0 and infinity are the ends."""
  ticks = ((0.0, "0"), (0.5, "½"), (1.0, "1"), (2.0, "2"), (4.0, "4"))
  return Scale(to_share=lambda v: v / (1 + v), ticks=ticks, unit=unit, digits=2)


EVEN_SHARE = _ratio("× even share")
LIFT = _ratio("× what is expected")


def cosine_scale(values: Sequence[np.ndarray]) -> Scale:
  """Of cosines: neutral at 1, where nothing differs, and orange far from it.

  Args:
    values: all that it is for; it reaches down to about the least of them.
  """
  known = np.concatenate([v[np.isfinite(v)] for v in values] or [np.ones(1)])
  apart = max(1 - float(known.min(initial=1.0)), 0.01)
  # 1, 2 or 5 times a power of ten, the first that is no less; at most 2.
  spans = [m * 10.0**e for e in (-2, -1, 0) for m in (1, 2, 5)]
  span = next(s for s in spans if s >= apart * 0.999)
  ticks = (0.0, span / 2, span)
  return Scale(
    to_share=lambda v: 0.5 + 0.5 * np.clip((1 - v) / span, 0, 1),
    ticks=tuple((1 - t, f"{1 - t:.3g}".replace("-", "−")) for t in ticks),
    unit="cosine",
    digits=_COSINE_DIGITS,
    whole=False,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
  """One map: a row for each label, a column for each expert."""

  title: str
  values: np.ndarray  # float [rows columns]; NaN is left neutral and empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Frame:
  """Where a map lies in the view."""

  x: Number
  y: Number
  width: Number
  height: Number


def grid_map(
  panel: Panel,
  *,
  rows: Sequence[str],
  scale: Scale,
  corner: str = "",
) -> Markup:
  """A map over the width of the page.

  Args:
    panel: the values; its title is the description for those who cannot see.
    rows: labels.
    scale: of the colours.
    corner: what the columns are, above the labels of the rows.

  Returns:
    The SVG element.
  """
  num_rows, num_columns = panel.values.shape
  left = max(svg.text_width(label, font=12) for label in (*rows, corner)) + 12
  width = min(64.0 * num_columns, _WIDTH - left - 2)
  height = num_rows * (24.0 if num_rows <= 24 else 15.0)
  frame = _Frame(x=left, y=22.0, width=width, height=height)
  parts = [
    _cells(panel, frame, rows=rows, scale=scale),
    _row_labels(rows, frame),
    _column_labels(num_columns, frame),
    _text(corner, x=left - 8, y=14, anchor="end"),
    _bar(scale, x=left, y=height + 38),
  ]
  return _chart(parts, height=height + 72, description=panel.title)


def panels(
  maps: Sequence[Panel],
  *,
  rows: Sequence[str],
  scale: Scale,
  cell: tuple[Number, Number],
  columns: int,
  description: str,
) -> Markup:
  """Small maps of the same rows beside each other.

  Args:
    maps: in reading order.
    rows: labels of their rows.
    scale: of the colours.
    cell: the largest width of a cell, and its height, in units of the view,
      which is 760 wide.
    columns: how many maps are beside each other.
    description: for those who cannot see it.

  Returns:
    The SVG element.
  """
  left = max(svg.text_width(label) for label in rows) + 10
  gap = 22.0
  width = (_WIDTH - left - gap * (columns - 1) - 2) / columns
  height = float(len(rows) * cell[1])
  parts = []
  for place, panel in enumerate(maps):
    row, column = divmod(place, columns)
    frame = _Frame(
      x=left + column * (width + gap),
      y=36 + row * (height + 54),
      width=min(width, float(cell[0] * panel.values.shape[1])),
      height=height,
    )
    parts += [
      _text(panel.title, x=frame.x, y=frame.y - 20, style="label strong"),
      _cells(panel, frame, rows=rows, scale=scale),
      _column_labels(panel.values.shape[1], frame),
    ]
    if column == 0:
      parts.append(_row_labels(rows, frame))
  bottom = 36 + -(-len(maps) // columns) * (height + 54) - 30
  parts.append(_bar(scale, x=left, y=bottom))
  return _chart(parts, height=bottom + 34, description=description)


def _chart(
  parts: Sequence[Markup], *, height: Number, description: str
) -> Markup:
  return element(
    "svg",
    element("title", description),
    *parts,
    viewBox=f"0 0 {_WIDTH} {height:g}",
    role="img",
    class_="chart",
  )


def _cells(
  panel: Panel, frame: _Frame, *, rows: Sequence[str], scale: Scale
) -> Markup:
  """The pixels, what each row says under the pointer, and numbers that fit."""
  values = panel.values
  known = np.isfinite(values)
  colours = svg.map_colours(
    np.where(known, scale.to_share(np.where(known, values, 1.0)), 0.5)
  )
  image = element(
    "image",
    href=svg.pixels(colours),
    x=f"{frame.x:g}",
    y=f"{frame.y:g}",
    width=f"{frame.width:g}",
    height=f"{frame.height:g}",
    preserveAspectRatio="none",
    class_="pixels",
  )
  num_rows, num_columns = values.shape
  cell = (frame.width / num_columns, frame.height / num_rows)
  parts = [image]
  for i, label in enumerate(rows):
    said = ", ".join(
      f"{e}: {scale.number(v)}" for e, v in enumerate(values[i]) if known[i, e]
    )
    parts.append(_hover(f"{panel.title}, {label}: {said}", frame, i, cell[1]))
  if cell[0] >= 9 + 6.2 * (1 + scale.digits) and cell[1] >= 12:
    parts += _numbers(values, colours, frame, cell=cell, scale=scale)
  return join(parts)


def _hover(title: str, frame: _Frame, row: int, height: Number) -> Markup:
  return element(
    "rect",
    element("title", title),
    x=f"{frame.x:g}",
    y=f"{frame.y + row * height:.1f}",
    width=f"{frame.width:g}",
    height=f"{height:.1f}",
    fill="transparent",
  )


def _numbers(
  values: Float[np.ndarray, "rows columns"],
  colours: np.ndarray,
  frame: _Frame,
  *,
  cell: tuple[Number, Number],
  scale: Scale,
) -> list[Markup]:
  found = []
  for (i, j), value in np.ndenumerate(values):
    red, green, blue = map(int, colours[i, j])
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    found.append(
      element(
        "text",
        scale.number(value),
        x=f"{frame.x + (j + 0.5) * cell[0]:.1f}",
        y=f"{frame.y + (i + 0.5) * cell[1] + 3.5:.1f}",
        text_anchor="middle",
        class_="cell",
        fill=_DARK if light > 140 else _LIGHT,
      )
    )
  return found


def _row_labels(rows: Sequence[str], frame: _Frame) -> Markup:
  height = frame.height / len(rows)
  step = _step(13 / height)
  return join(
    [
      _text(
        label,
        x=frame.x - 8,
        y=frame.y + (i + 0.5) * height + 3.5,
        anchor="end",
      )
      for i, label in enumerate(rows)
      if i % step == 0
    ]
  )


def _column_labels(count: int, frame: _Frame) -> Markup:
  width = frame.width / count
  step = _step((8 + 6.2 * len(str(count - 1))) / width)
  return join(
    [
      _text(
        str(i),
        x=frame.x + (i + 0.5) * width,
        y=frame.y - 6,
        anchor="middle",
      )
      for i in range(0, count, step)
    ]
  )


def _step(least: float) -> int:
  """1, 2, 4, 8, ...: the first that is no less."""
  step = 1
  while step < least:
    step *= 2
  return step


def _bar(scale: Scale, *, x: Number, y: Number) -> Markup:
  """The colours with their values."""
  low, high = (0.0, 1.0) if scale.whole else (0.5, 1.0)
  width = 260.0 * (high - low)
  shares = np.linspace(low, high, 101)[None]
  parts = [
    element(
      "image",
      href=svg.pixels(svg.map_colours(shares)),
      x=f"{x:g}",
      y=f"{y:g}",
      width=f"{width:g}",
      height=10,
      preserveAspectRatio="none",
    )
  ]
  for value, label in scale.ticks:
    share = (float(scale.to_share(np.asarray(value))) - low) / (high - low)
    parts.append(_text(label, x=x + width * share, y=y + 23, anchor="middle"))
  parts.append(_text(scale.unit, x=x + width + 12, y=y + 9))
  return join(parts)


def _text(
  content: str,
  *,
  x: Number,
  y: Number,
  anchor: str = "start",
  style: str = "label",
) -> Markup:
  return element(
    "text",
    content,
    x=f"{x:.1f}",
    y=f"{y:.1f}",
    text_anchor=anchor,
    class_=style,
  )
