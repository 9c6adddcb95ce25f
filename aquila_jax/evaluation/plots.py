"""The figures of a report, each with a legend and a word on reading it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from aquila_jax.evaluation import formats, svg
from aquila_jax.evaluation.formats import Number
from aquila_jax.evaluation.headline import Headline
from aquila_jax.evaluation.markup import Markup, element
from aquila_jax.evaluation.results import (
  METHOD_NAMES,
  Point,
  ReportInput,
  StageResult,
  is_finite,
  smooth,
  thin,
)

_LOSS = "loss, nats/token"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Along:
  """What a horizontal axis measures: FLOPs or seconds of the lineage."""

  of: Callable[[Point], Number]
  label: str
  divide: Number

  def axis(self, points: Sequence[Point]) -> svg.Axis:
    high = max(map(self.of, points), default=self.divide)
    return svg.Axis(
      label=self.label, low=0.0, high=high * 1.01, divide=self.divide
    )


def along_flops(points: Sequence[Point]) -> Along:
  """FLOPs in units of a power of ten."""
  high = max((point.flops for point in points), default=1.0) or 1.0
  exponent = math.floor(math.log10(high))
  unit = formats.power_of_ten(exponent)
  return Along(
    of=lambda point: point.flops,
    label=f"training FLOPs, ancestors included (× {unit})",
    divide=10.0**exponent,
  )


def along_wall(points: Sequence[Point]) -> Along:
  """Seconds, minutes or hours."""
  high = max((point.wall_s for point in points), default=1.0)
  unit, divide = "s", 1.0
  if high > 7200:
    unit, divide = "h", 3600.0
  elif high > 180:
    unit, divide = "min", 60.0
  return Along(
    of=lambda point: point.wall_s,
    label=f"training time, ancestors included ({unit})",
    divide=divide,
  )


def figure(
  chart: object, caption: str, *, legend: Sequence[tuple[str, str]] = ()
) -> Markup:
  """A figure: legend of (style class, words), chart, explanation."""
  keys = [
    element("li", element("i", class_=f"key {style}"), words)
    for style, words in legend
  ]
  return element(
    "figure",
    element("ul", *keys, class_="legend") if keys else "",
    chart,
    element("figcaption", caption),
  )


def loss_figure(
  report: ReportInput, along: Along, *, result: Headline | None = None
) -> Markup:
  """Training and validation loss of EfficientScale and its controls.

  Args:
    report: the experiment.
    along: the horizontal axis.
    result: draws the loss that EfficientScale ended on.

  Returns:
    The figure.
  """
  tracks = [(report.lineage, "efficient")]
  tracks += [([control], "control") for control in report.controls]
  shown = _visible_losses(report)
  points = [p for stages, _ in tracks for s in stages for p in s.curve("loss")]
  low, high = svg.span(shown)
  chart = svg.Chart(
    x=along.axis(points),
    y=svg.Axis(label=_LOSS, low=low, high=high),
    height=380,
  )
  if result is not None:
    words = f"EfficientScale's last validation: {formats.loss(result.loss)}"
    chart.level(result.loss, words)
  _transform_marks(chart, report, along)
  for stages, style in tracks:
    for stage in stages:
      raw = stage.curve("loss")
      chart.line(_xy(thin(raw), along), f"{style} raw")
      chart.line(_xy(thin(smooth(raw)[0]), along), f"{style} smooth")
  for stages, style in tracks:
    for stage in stages:
      curve = thin(stage.validation_curve(), limit=120)
      titles = [
        f"{stage.name}, validation: {formats.loss(p.value)} nats/token at"
        f" {formats.scientific(p.flops)} FLOPs, {formats.duration(p.wall_s)}"
        for p in curve
      ]
      chart.dots(_xy(curve, along), style, titles=titles)
  legend = [("efficient smooth", "EfficientScale, training")]
  if report.controls:
    legend.append(("control smooth", "control, training"))
  legend += [("efficient dot", "validation")]
  if report.controls:
    legend.append(("control dot", "validation of the control"))
  if any(s.transform_losses for s in report.lineage):
    legend.append(("jump dot", "validation right after a transform"))
  return figure(
    chart.render(f"Loss by {along.label}"), _loss_caption(report), legend=legend
  )


def _loss_caption(report: ReportInput) -> str:
  widths = sorted(
    {smooth(stage.curve("loss"))[1] for stage in report.stages if stage.rows}
  )
  average = " or ".join(map(str, widths)) or "1"
  return (
    "Cross-entropy of all languages together. Faint: the mean between two log"
    f" rows; solid: a moving average over {average} of them; circles:"
    " validation. Vertical lines are the transforms, where the loss jumps"
    " unless the transform preserves the function. The beginning of a training"
    " from scratch is cut off at the top."
  )


def _visible_losses(report: ReportInput) -> list[float]:
  """Losses that the axis has to hold: all but the first fall of a stage."""
  values = []
  for stage in report.stages:
    curve = smooth(stage.curve("loss"))[0]
    values += [p.value for p in curve[max(1, len(curve) // 20) :]]
    values += [p.value for p in stage.validation_curve()]
    values += [v for v in _jump_losses(stage) if is_finite(v)]
  return values


def _jump_losses(stage: StageResult) -> list[float]:
  """Loss of the source and right after the transform that was used."""
  losses = stage.transform_losses
  if "source" not in losses or stage.method not in losses:
    return []
  return [losses["source"], losses[stage.method]]


def _transform_marks(
  chart: svg.Chart, report: ReportInput, along: Along
) -> None:
  for stage in report.lineage:
    if not stage.parent:
      continue
    start = Point(stage.flops_before, stage.wall_before_s, 0.0)
    chart.vertical(along.of(start), stage.title)
    jump = _jump_losses(stage)
    if jump:
      before, after = map(formats.loss, jump)
      chart.jump(
        along.of(start),
        (jump[0], jump[1]),
        title=f"{stage.transform}: {before} → {after} nats/token",
      )


def _xy(points: Sequence[Point], along: Along) -> list[svg.XY]:
  return [(along.of(point), point.value) for point in points]


def transform_figure(report: ReportInput) -> Markup | None:
  """Loss before and right after every transform, and after training."""
  groups, values = [], []
  for stage in report.stages:
    rows = _transform_bars(stage)
    if rows:
      groups.append((stage.title, rows))
      values += [value for _, value, _ in rows]
  if not groups:
    return None
  chart = svg.bars(
    groups,
    axis=svg.Axis(label="validation loss, nats/token", low=0, high=max(values)),
    number=formats.loss,
    description="Validation loss before and after each transform",
  )
  return figure(
    chart,
    "Validation loss of the source, right after the transform by each method"
    " tried (strong: the one that training went on from), and when the stage"
    " was trained. A method that preserves the function leaves the loss as it"
    " was; whether that is the better start shows only after training.",
  )


def _transform_bars(stage: StageResult) -> list[tuple[str, Number, str]]:
  losses = {k: v for k, v in stage.transform_losses.items() if is_finite(v)}
  if not losses:
    return []
  rows = []
  if "source" in losses:
    rows.append((f"source ({stage.parent})", losses.pop("source"), "source"))
  for method, value in losses.items():
    name = METHOD_NAMES.get(method, method)
    used = method == stage.method
    rows.append((f"right after {name}", value, "used" if used else "tried"))
  curve = stage.validation_curve()
  if curve:
    rows.append(("after training", curve[-1].value, "trained"))
  return rows


def language_figure(report: ReportInput, along: Along) -> Markup | None:
  """Training loss of every language, smoothed."""
  tracks = [(report.lineage, "smooth")]
  tracks += [([control], "smooth dashed") for control in report.controls]
  lines, legend, values = [], [], []
  for i, language in enumerate(report.languages):
    colour = f"hue{i % 6}"
    for stages, style in tracks:
      for stage in stages:
        curve = smooth(stage.curve(f"loss_{language}"))[0]
        lines.append((thin(curve), f"{colour} {style}"))
        values += [p.value for p in curve[max(1, len(curve) // 20) :]]
    legend.append((f"{colour} smooth", language))
  if not values:
    return None
  if report.controls:
    legend.append(("smooth dashed", "control"))
  low, high = svg.span(values)
  chart = svg.Chart(
    x=along.axis([p for curve, _ in lines for p in curve]),
    y=svg.Axis(label=_LOSS, low=low, high=high),
  )
  _transform_marks_only(chart, report, along)
  for curve, style in lines:
    chart.line(_xy(curve, along), style)
  return figure(
    chart.render("Training loss by language"),
    "Training loss of each language, smoothed. Losses of two languages are not"
    " comparable: a token of one holds more text than a token of the other."
    " Bits per byte in the table of evaluations are.",
    legend=legend,
  )


def _transform_marks_only(
  chart: svg.Chart, report: ReportInput, along: Along
) -> None:
  for stage in report.lineage:
    if stage.parent:
      start = Point(stage.flops_before, stage.wall_before_s, 0.0)
      chart.vertical(along.of(start), stage.name)


def field_figure(
  report: ReportInput,
  along: Along,
  *,
  key: str,
  label: str,
  caption: str,
  percent: bool = False,
  scaled: bool = False,
  width: Number = 760,
) -> Markup | None:
  """A field of the metrics over the whole lineage, and of the controls."""
  tracks = [(stage, "efficient") for stage in report.lineage]
  tracks += [(control, "control") for control in report.controls]
  curves = [(stage.curve(key), style) for stage, style in tracks]
  points = [p for curve, _ in curves for p in curve]
  if not points:
    return None
  divide = 1.0
  low, high = svg.span([p.value for p in points], zero=True)
  if scaled:
    exponent = math.floor(math.log10(high))
    label = f"{label} (× {formats.power_of_ten(exponent)})"
    divide = 10.0**exponent
  chart = svg.Chart(
    x=along.axis(points),
    y=svg.Axis(label=label, low=low, high=high, percent=percent, divide=divide),
    width=width,
    height=240,
  )
  _transform_marks_only(chart, report, along)
  for curve, style in curves:
    chart.line(_xy(thin(curve), along), f"{style} smooth")
  legend = [("efficient smooth", "EfficientScale")]
  if report.controls:
    legend.append(("control smooth", "control"))
  return figure(chart.render(label), caption, legend=legend)
