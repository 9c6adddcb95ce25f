"""How the tokens spread over the experts: maps a layer, and the worst layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aquila_jax.evaluation import formats, svg
from aquila_jax.evaluation.formats import Number
from aquila_jax.evaluation.markup import Markup, element, join
from aquila_jax.evaluation.plots import Along, figure
from aquila_jax.evaluation.results import (
  Point,
  ReportInput,
  Row,
  StageResult,
  is_finite,
  thin,
)

_COLUMNS = 3  # panels beside each other
_PANEL = 222  # their width
_GAP = 28
_LEFT = 30
_PIXELS = 111  # columns of a map, at most


def load_maps(stage: StageResult) -> Markup | None:
  """A map a layer: expert by time, coloured by the share of assignments."""
  rows = [row for row in stage.rows if row.get("expert_load")]
  if not rows:
    return None
  # A layer without experts has no load.
  layers = [
    i for i, load in enumerate(rows[0]["expert_load"]) if load is not None
  ]
  # [rows, L, E] -> [L, E, rows]; 1 is an even share.
  loads = np.asarray(
    [[row["expert_load"][i] for i in layers] for row in rows], np.float64
  )
  loads = np.moveaxis(loads * loads.shape[-1], 0, -1)
  num_experts = loads.shape[1]
  height = max(48, min(12 * num_experts, 120))
  parts = []
  for panel, layer in enumerate(layers):
    row, column = divmod(panel, _COLUMNS)
    x = _LEFT + column * (_PANEL + _GAP)
    y = 18 + row * (height + 30)
    parts.append(_panel(loads[panel], layer=layer, x=x, y=y, height=height))
  num_rows = -(-len(layers) // _COLUMNS)
  bottom = 18 + num_rows * (height + 30)
  parts.append(_ends(rows, y=bottom - 16))
  parts.append(_colour_bar(y=bottom + 12))
  chart = element(
    "svg",
    element("title", f"Expert load by layer and time, stage {stage.name}"),
    *parts,
    viewBox=f"0 0 760 {bottom + 48}",
    role="img",
    class_="chart",
  )
  return figure(
    chart,
    f"Stage {stage.name}: the share of the assignments that each of"
    f" {num_experts} experts gets, in multiples of an even share, layer by"
    " layer from the first step of the stage (left) to the last (right)."
    " Each row of a map is an expert.",
  )


def _panel(
  loads: np.ndarray, *, layer: int, x: Number, y: Number, height: Number
) -> Markup:
  num_experts, num_times = loads.shape
  groups = np.array_split(np.arange(num_times), min(num_times, _PIXELS))
  means = np.stack([loads[:, group].mean(-1) for group in groups], axis=-1)
  # v / (1 + v): a share of 1 is the middle, 0 and infinity the ends.
  image = svg.pixels(svg.map_colours(means / (1 + means)))
  last = loads[:, -1]
  title = f"layer {layer}, at the end: " + ", ".join(
    f"expert {i}: {value:.2f}" for i, value in enumerate(last)
  )
  first_y, last_y = y + height / num_experts, y + height - 2
  return element(
    "g",
    element("title", title),
    _text(f"layer {layer}", x=x, y=y - 5, style="label strong"),
    element(
      "image",
      href=image,
      x=x,
      y=y,
      width=_PANEL,
      height=height,
      preserveAspectRatio="none",
      class_="pixels",
    ),
    _text("0", x=x - 6, y=min(first_y, y + 9), anchor="end"),
    _text(str(num_experts - 1), x=x - 6, y=last_y, anchor="end"),
  )


def _ends(rows: Sequence[Row], *, y: Number) -> Markup:
  first, last = (f"step {rows[i]['step']:,}" for i in (0, -1))
  return join(
    [
      _text(first, x=_LEFT, y=y),
      _text(last, x=_LEFT + _PANEL, y=y, anchor="end"),
    ]
  )


def _colour_bar(*, y: Number) -> Markup:
  width, x = 300.0, float(_LEFT)
  shares = np.linspace(0, 1, 101)[None]
  parts = [
    element(
      "image",
      href=svg.pixels(svg.map_colours(shares)),
      x=x,
      y=y,
      width=width,
      height=10,
      preserveAspectRatio="none",
    )
  ]
  for value, label in ((0, "0"), (0.5, "½"), (1, "1"), (2, "2"), (4, "4")):
    middle = x + width * value / (1 + value)
    parts.append(_text(label, x=middle, y=y + 23, anchor="middle"))
  parts.append(_text("× even share", x=x + width + 10, y=y + 9))
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
    "text", content, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor, class_=style
  )


def balance_figure(report: ReportInput, along: Along) -> Markup | None:
  """The largest load over the mean, in the worst layer, over time."""
  tracks = [(stage, "efficient") for stage in report.lineage]
  tracks += [(control, "control") for control in report.controls]
  curves = [(_worst_layer(s, "load_max_over_mean"), c) for s, c in tracks]
  curves = [(curve, style) for curve, style in curves if curve]
  if not curves:
    return None
  points = [p for curve, _ in curves for p in curve]
  _, high = svg.span([p.value for p in points])
  chart = svg.Chart(
    x=along.axis(points),
    y=svg.Axis(label="max / mean load", low=1.0, high=max(high, 1.1)),
    height=240,
  )
  for curve, style in curves:
    xy = [(along.of(p), p.value) for p in thin(curve)]
    chart.line(xy, f"{style} smooth")
  legend = [("efficient smooth", "EfficientScale")]
  if any(style == "control" for _, style in curves):
    legend.append(("control smooth", "control"))
  return figure(
    chart.render("Imbalance of the worst layer"),
    "The load of the busiest expert over the mean, in the layer where that is"
    f" largest; 1 is perfect balance. {_dropped(report)}",
    legend=legend,
  )


def _worst_layer(stage: StageResult, key: str) -> list[Point]:
  found = []
  for row in stage.rows:
    # A layer without experts has None.
    values = [value for value in row.get(key) or () if value is not None]
    if values and all(map(is_finite, values)):
      flops = stage.flops_before + row["flops"]
      wall_s = stage.wall_before_s + row["wall_s"]
      found.append(Point(flops, wall_s, float(max(values))))
  return found


def _dropped(report: ReportInput) -> str:
  most = max(
    (
      point.value
      for stage in report.stages
      for point in _worst_layer(stage, "dropped_share")
    ),
    default=0.0,
  )
  if most == 0:
    return "No assignment was dropped."
  return f"At most {formats.percent(most)} of the assignments were dropped."
