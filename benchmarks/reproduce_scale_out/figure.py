"""Validation loss over FLOPs after the checkpoint, as an SVG file."""

from __future__ import annotations

import math

from aquila_jax.evaluation import svg
from aquila_jax.evaluation.markup import Markup
from benchmarks.reproduction import drawing
from benchmarks.reproduction.statistics import (
  Curve,
  Results,
  curves,
  mean_curve,
  spread,
)

# Told apart also by those who do not see red or green (Okabe and Ito); the
# variants of one method by their dashes.
_LINES = {
  "dense": "stroke: #888888;",
  "sparse_upcycling": "stroke: #0072b2;",
  "drop_25": "stroke: #e69f00; stroke-dasharray: 2 3;",
  "drop_50": "stroke: #e69f00;",
  "drop_100": "stroke: #e69f00; stroke-dasharray: 8 3;",
  "granular": "stroke: #009e73;",
  "noise": "stroke: #56b4e9;",
  "shared": "stroke: #cc79a7;",
  "scratch": "stroke: #d55e00;",
}
_BAND = ".line.band { stroke: none; fill-opacity: .15; }\n"
# Losses before this share of the FLOPs are far above, and cut off.
_SHOWN_FROM = 0.2


def render(results: Results, names: dict[str, str]) -> str:
  """The figure: the mean over the seeds of every arm, in a band.

  Args:
    results: of `collected.collect`.
    names: words for each arm, in order.

  Returns:
    The text of an SVG file; "" where no arm is done. The upper chart ends where
    the arms do, the lower one where training from scratch does.
  """
  found = {arm: list(curves(results, arm).values()) for arm in names}
  found = {arm: of_seeds for arm, of_seeds in found.items() if of_seeds}
  if not found:
    return ""
  order = list(names)
  arms = {a: c for a, c in found.items() if a != "scratch"}
  charts = [
    _chart(found, order, shown=shown, description=words)
    for shown, words in (
      (arms, "Validation loss of every arm over its FLOPs"),
      (found, "The same, to the end of training from scratch"),
    )
    if shown
  ]
  bands = "".join(
    f".arm{i}.band {{ fill: {_colour(arm)}; }}\n" for i, arm in enumerate(order)
  )
  return drawing.standing_alone(
    charts,
    legend=[(order.index(arm), names[arm]) for arm in found],
    styles=[_LINES[arm] for arm in order],
    more=_BAND + bands,
  )


def _colour(arm: str) -> str:
  return _LINES[arm].removeprefix("stroke: ").partition(";")[0]


def _chart(
  found: dict[str, list[Curve]],
  order: list[str],
  *,
  shown: dict[str, list[Curve]],
  description: str,
) -> Markup:
  """All arms, in a range that holds those of `shown`."""
  every = [p for of_seeds in shown.values() for c in of_seeds for p in c]
  last = max(flops for flops, _ in every)
  low, high = svg.span([y for x, y in every if x >= _SHOWN_FROM * last])
  chart = svg.Chart(
    x=svg.Axis(
      label="FLOPs after the checkpoint, of scratch after its start (× 10¹²)",
      low=0.0,
      high=last * 1.01,
      divide=1e12,
    ),
    y=svg.Axis(label="validation loss, nats/token", low=low, high=high),
    height=drawing.HEIGHT,
  )
  for arm, of_seeds in found.items():
    style = f"arm{order.index(arm)}"
    if len(of_seeds) > 1:
      chart.line(drawing.points(_band(of_seeds)), f"{style} band")
    chart.line(drawing.points(mean_curve(of_seeds)), style)
  return chart.render(description)


def _band(of_seeds: list[Curve]) -> Curve:
  """Round the mean, a standard deviation below and then above it."""
  below, above = [], []
  for points in zip(*of_seeds, strict=False):
    losses = spread([loss for _, loss in points])
    assert losses is not None and losses.deviation is not None
    assert math.isfinite(losses.mean)
    below.append([points[0][0], losses.mean - losses.deviation])
    above.append([points[0][0], losses.mean + losses.deviation])
  return below + above[::-1]
