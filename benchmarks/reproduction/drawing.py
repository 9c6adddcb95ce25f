"""Charts as an SVG file that stands by itself, below a legend."""

from __future__ import annotations

from collections.abc import Sequence

from aquila_jax.evaluation import svg
from aquila_jax.evaluation.markup import Markup, element, join
from benchmarks.reproduction.statistics import Curve

WIDTH, HEIGHT = 760, 420
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


def points(curve: Curve) -> list[svg.XY]:
  """A curve as svg.Chart takes it."""
  return [(place, loss) for place, loss in curve]


def standing_alone(
  drawings: Sequence[Markup],
  *,
  legend: Sequence[tuple[int, str]],
  styles: Sequence[str],
  more: str = "",
) -> str:
  """Charts below their legend, with the style that a page would give them.

  Args:
    drawings: of svg.Chart, `WIDTH` by `HEIGHT`, from top to bottom.
    legend: of each entry the number of its style, and words.
    styles: CSS of the classes arm0, arm1 and on.
    more: CSS.

  Returns:
    The text of an SVG file.
  """
  half = -(-len(legend) // 2)
  above = _LEGEND_ROW * half + 8
  entries = []
  for i, (style, words) in enumerate(legend):
    x = _LEFT + (WIDTH - _LEFT) / 2 * (i // half)
    y = _LEGEND_ROW * (i % half) + 14
    entries += [
      element("path", d=f"M{x:g} {y - 4}h24", class_=f"line arm{style}"),
      element("text", words, x=f"{x + 32:g}", y=y),
    ]
  of_arms = "".join(f".arm{i} {{ {css} }}\n" for i, css in enumerate(styles))
  height = above + HEIGHT * len(drawings)
  figure = element(
    "svg",
    element("style", Markup(_STYLE + more + of_arms)),
    *entries,
    *(
      element("svg", drawing, y=above + HEIGHT * i, width=WIDTH, height=HEIGHT)
      for i, drawing in enumerate(drawings)
    ),
    xmlns="http://www.w3.org/2000/svg",
    viewBox=f"0 0 {WIDTH} {height}",
    width=WIDTH,
    height=height,
  )
  return join([figure, "\n"])
