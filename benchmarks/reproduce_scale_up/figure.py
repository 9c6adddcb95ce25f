"""The curves of continued training, as an SVG file that stands by itself."""

from __future__ import annotations

from collections.abc import Sequence

from aquila_jax.evaluation import svg
from aquila_jax.evaluation.markup import Markup, element, join
from benchmarks.reproduce_scale_up import statistics
from benchmarks.reproduce_scale_up.statistics import Curve, Results

# Told apart also by those who do not see red or green (Okabe and Ito).
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#888888")
# Colours of text and grid read on white and on black.
_STYLE = """
text { font: 11px sans-serif; fill: #777; }
.grid { stroke: #777; stroke-opacity: .25; fill: none; }
.axis { stroke: #777; fill: none; }
.line { fill: none; stroke-linejoin: round; stroke-width: 2; }
.one { stroke-width: 1; stroke-opacity: .35; }
"""
_LEGEND_ROW = 18
_LEFT = 66  # of svg.Chart's plot
# Losses before this share of the tokens are far above, and cut off.
_SHOWN_FROM = 0.2


def render(results: Results, names: dict[str, str]) -> str:
  """The figure: the mean over the seeds of every arm, and each seed thin.

  Args:
    results: of `collected.collect`.
    names: words for each arm, in order.

  Returns:
    The text of an SVG file; "" where no arm is done.
  """
  arms = {arm: statistics.curves(results, arm) for arm in names}
  arms = {arm: curves for arm, curves in arms.items() if curves}
  every = [
    point for curves in arms.values() for c in curves.values() for point in c
  ]
  if not every:
    return ""
  last = max(tokens for tokens, _ in every)
  shown = [loss for tokens, loss in every if tokens >= _SHOWN_FROM * last]
  low, high = svg.span(shown)
  chart = svg.Chart(
    x=svg.Axis(
      label="tokens after growth (× 1,000)",
      low=0.0,
      high=last * 1.01,
      divide=1e3,
    ),
    y=svg.Axis(label="validation loss, nats/token", low=low, high=high),
    height=420,
  )
  order = list(names)
  for arm, curves in arms.items():
    style = f"arm{order.index(arm)}"
    if len(curves) > 1:
      for curve in curves.values():
        chart.line(_points(curve), f"{style} one")
    chart.line(_points(mean_curve(list(curves.values()))), style)
  drawing = chart.render("Validation loss of every arm over tokens")
  return _standing_alone(drawing, [(order.index(a), names[a]) for a in arms])


def mean_curve(curves: Sequence[Curve]) -> Curve:
  """The mean at the validations that all of the curves have."""
  return [
    [points[0][0], sum(loss for _, loss in points) / len(points)]
    for points in zip(*curves, strict=False)
  ]


def _points(curve: Curve) -> list[svg.XY]:
  return [(tokens, loss) for tokens, loss in curve]


def _standing_alone(drawing: Markup, legend: list[tuple[int, str]]) -> str:
  """The chart below its legend, with the style that a page would give it."""
  width, height = 760, 420
  half = -(-len(legend) // 2)
  above = _LEGEND_ROW * half + 8
  entries = []
  for i, (colour, words) in enumerate(legend):
    x = _LEFT + (width - _LEFT) / 2 * (i // half)
    y = _LEGEND_ROW * (i % half) + 14
    entries += [
      element("path", d=f"M{x:g} {y - 4}h24", class_=f"line arm{colour}"),
      element("text", words, x=f"{x + 32:g}", y=y),
    ]
  colours = "".join(
    f".arm{i} {{ stroke: {colour}; }}\n" for i, colour in enumerate(_COLOURS)
  )
  figure = element(
    "svg",
    element("style", Markup(_STYLE + colours)),
    *entries,
    element("svg", drawing, y=above, width=width, height=height),
    xmlns="http://www.w3.org/2000/svg",
    viewBox=f"0 0 {width} {above + height}",
    width=width,
    height=above + height,
  )
  return join([figure, "\n"])
