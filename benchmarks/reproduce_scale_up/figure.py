"""The curves of continued training, as an SVG file that stands by itself."""

from __future__ import annotations

from aquila_jax.evaluation import svg
from benchmarks.reproduction import drawing, statistics
from benchmarks.reproduction.statistics import Results

# Told apart also by those who do not see red or green (Okabe and Ito).
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#888888")
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
    height=drawing.HEIGHT,
  )
  order = list(names)
  for arm, curves in arms.items():
    style = f"arm{order.index(arm)}"
    if len(curves) > 1:
      for curve in curves.values():
        chart.line(drawing.points(curve), f"{style} one")
    mean = statistics.mean_curve(list(curves.values()))
    chart.line(drawing.points(mean), style)
  return drawing.standing_alone(
    [chart.render("Validation loss of every arm over tokens")],
    legend=[(order.index(a), names[a]) for a in arms],
    styles=[f"stroke: {colour};" for colour in _COLOURS],
  )
