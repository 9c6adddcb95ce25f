"""The page of the results: every number in it is computed here.

  python -m benchmarks.reproduce_scale_up.page RESULTS PAGE

page.md beside this file has the frame, words.md what a person makes of it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

from benchmarks.reproduce_scale_up import figure, initial, statistics
from benchmarks.reproduction import pages
from benchmarks.reproduction.pages import shown, table
from benchmarks.reproduction.statistics import (
  Results,
  Spread,
  curves,
  loss_at,
  spread,
)

ARMS = {
  "fpi": "FPI, interpolation",
  "fpi_noise": "FPI, copies parted by noise",
  "aki_pro": "AKI-Pro, residual of the next layer",
  "aki_pro_own_layer": "AKI-Pro, residual of its own layer",
  "lemon": "LEMON",
  "random": "random",
}
# What AquilaMoE printed: source, then the loss after growth.
_PAPER = {
  ("width x2", "FPI, interpolation"): "2.97 -> 2.97; 1.85 -> 1.85",
  ("width x1.25", "FPI, interpolation"): "1.85 -> 1.96",
  (initial.MAIN, "FPI, interpolation"): "2.97 -> 3.31",
  (initial.MAIN, "FPI, stacking"): "2.97 -> 4.30",
  (initial.MAIN, "AKI, stacking, next_layer"): "2.97 -> 9.56",
  (initial.MAIN, "AKI, stacking, own_layer"): "2.97 -> 9.56",
  (initial.MAIN, "AKI-Pro, next_layer"): "2.97 -> 7.81",
  (initial.MAIN, "AKI-Pro, own_layer"): "2.97 -> 7.81",
  (initial.MAIN, "random"): "2.97 -> 12.22",
  ("width x1.25, depth x4/3", "FPI, interpolation"): "1.85 -> 2.24 (x5/4)",
  ("width x1.25, depth x4/3", "AKI-Pro, next_layer"): "1.85 -> 7.90 (x5/4)",
  ("width x1.25, depth x4/3", "AKI-Pro, own_layer"): "1.85 -> 7.90 (x5/4)",
}
# An exact growth differs by the rounding of float32.
_ROUNDING = 1e-3
_HERE = pathlib.Path(__file__).resolve().parent


def write(results: Results, path: pathlib.Path) -> None:
  """Writes the page, and its figure beside it."""
  pages.write(
    path,
    drawing=figure.render(results, ARMS),
    render=lambda name: render(results, figure_name=name),
  )


def render(results: Results, *, figure_name: str) -> str:
  """The page of a results file."""
  values = {
    **pages.where_measured(results),
    "done": _done(results),
    "models": table(_models(results), left=1),
    "source": shown(statistics.initial_loss(results, "", "source")),
    "unigram": shown(
      spread(
        [row["unigram"] for row in statistics.initial(results, "", "source")]
      )
    ),
    "ligo_steps": str(results["ligo_steps"]),
    "rates": " and ".join(
      f"{'the source' if n == 'source' else 'an arm'} {m['learning_rate']:g}"
      for n, m in results["models"].items()
    ),
    "initial": "\n\n".join(_initial_tables(results)),
    "findings": table(_findings(results), left=3),
    "figure": figure_name,
    "arms": table(_arm_rows(results), left=1),
    "overtaking": table(_overtaking(results), left=1),
    "checks": table(_checks(results), left=1),
  }
  return pages.filled(_HERE, values)


def _done(results: Results) -> str:
  measured = [s for s, found in results["seeds"].items() if found["initial"]]
  return (
    f"Done so far: initial losses of {len(measured)} seeds, continued training"
    f" of {pages.seeds_with(results, results['arms'])}."
  )


def _models(results: Results) -> list[list[str]]:
  rows = [
    [
      "",
      "layers",
      "width",
      "FFN",
      "query heads / groups",
      "parameters",
      "tokens trained",
      "tokens/s, mean",
    ],
  ]
  for name, size in results["models"].items():
    rows.append(
      [
        "source" if name == "source" else "each arm",
        str(size["layers"]),
        str(size["width"]),
        str(size["FFN"]),
        f"{size['heads']} / {size['groups']}",
        f"{size['parameters']:,}",
        f"{size['tokens']:,}",
        pages.tokens_per_s(results, name, size["tokens"]),
      ]
    )
  return rows


def _initial_tables(results: Results) -> Iterator[str]:
  for size in initial.SIZES:
    rows = [["method", "predicted", "AquilaMoE", "loss", "above the source's"]]
    for name, method in initial.METHODS.items():
      found = statistics.initial(results, size, name)
      if not method.fits(size) or not found:
        continue
      words = name
      if initial.SIZES[size].depth == 1 and name == "FPI, interpolation":
        words = "FPI"
      rows.append(
        [
          words,
          "exact" if found[0]["exact"] else "not exact",
          _PAPER.get((size, name), ""),
          shown(statistics.initial_loss(results, size, name)),
          shown(_rise(results, size, name)),
        ]
      )
    yield f"### {size[0].upper()}{size[1:]}\n\n" + table(rows, left=3)


def _rise(results: Results, size: str, method: str) -> Spread | None:
  """How far a growth lies above its own seed's source."""
  rises = []
  for found in results["seeds"].values():
    by_name = {(r["size"], r["method"]): r["loss"] for r in found["initial"]}
    if (size, method) in by_name:
      rises.append(by_name[size, method] - by_name["", "source"])
  return spread(rises)


def _findings(results: Results) -> list[list[str]]:
  """The shape of the paper's tables, and whether it is in ours."""
  rows = [["expected", "found", "numbers"]]

  def add(expected: str, spreads: dict[str, Spread | None], holds) -> None:
    if not all(spreads.values()):
      rows.append([expected, "not measured", ""])
      return
    numbers = {name: s.mean for name, s in spreads.items() if s}
    ok = holds(*[s for s in spreads.values() if s])
    words = ", ".join(f"{name} {mean:.3f}" for name, mean in numbers.items())
    rows.append([expected, "yes" if ok else "**no**", words])

  def rise(method: str, size: str = initial.MAIN) -> Spread | None:
    return _rise(results, size, method)

  def of_each(compare):
    """Whether something holds in every seed."""
    return lambda *s: all(
      compare(*v) for v in zip(*(x.values for x in s), strict=False)
    )

  fpi, stack = rise("FPI, interpolation"), rise("FPI, stacking")
  add(
    "twice the width by FPI is exact",
    {"rise": rise("FPI, interpolation", "width x2")},
    of_each(lambda a: abs(a) < _ROUNDING),
  )
  add(
    "width x1.25 by FPI is not exact, but near",
    {
      "rise": rise("FPI, interpolation", "width x1.25"),
      "random's": rise("random", "width x1.25"),
    },
    of_each(lambda a, b: _ROUNDING < a < 0.25 * b),
  )
  add(
    "interpolation lies far below stacking (rise at most half)",
    {"interpolation": fpi, "stacking": stack},
    of_each(lambda a, b: a < 0.5 * b),
  )
  for reading in ("next_layer", "own_layer"):
    pro = rise(f"AKI-Pro, {reading}")
    add(
      f"AKI-Pro ({reading}) starts far above FPI (rise at least twice)",
      {"AKI-Pro": pro, "FPI": fpi},
      of_each(lambda a, b: a > 2 * b),
    )
    add(
      f"AKI-Pro ({reading}) starts below AKI with stacking",
      {"AKI-Pro": pro, "AKI, stacking": rise(f"AKI, stacking, {reading}")},
      of_each(lambda a, b: a < b),
    )
    add(
      f"AKI-Pro ({reading}) starts below random",
      {"AKI-Pro": pro, "random": rise("random")},
      of_each(lambda a, b: a < b),
    )
  add(
    "what is predicted exact is exact",
    {"largest rise": _worst(results)},
    of_each(lambda a: a < _ROUNDING),
  )
  for reading, arm in (
    ("next_layer", "aki_pro"),
    ("own_layer", "aki_pro_own_layer"),
  ):
    for other in ("fpi", "fpi_noise"):
      add(
        f"AKI-Pro ({reading}) ends below {ARMS[other]}",
        {"AKI-Pro": _last(results, arm), "other": _last(results, other)},
        of_each(lambda a, b: a < b),
      )
  return rows


def _worst(results: Results) -> Spread | None:
  """Of each seed the largest change by a growth that is predicted exact."""
  worst = []
  for found in results["seeds"].values():
    rows = found["initial"]
    source = [row["loss"] for row in rows if not row["size"]]
    if source:
      worst.append(
        max(abs(row["loss"] - source[0]) for row in rows if row["exact"])
      )
  return spread(worst)


def _last(results: Results, arm: str) -> Spread | None:
  found = curves(results, arm)
  return spread([curve[-1][1] for curve in found.values()])


def _arm_rows(results: Results) -> list[list[str]]:
  """Validation loss of every arm at some numbers of tokens."""
  points = sorted(
    {
      tokens
      for arm in ARMS
      for curve in curves(results, arm).values()
      for tokens, _ in curve
    }
  )
  if not points:
    return []
  last = len(points) - 1
  chosen = sorted({0, 1, *(round(last * share / 4) for share in range(1, 5))})
  chosen = [points[i] for i in chosen if i <= last]
  rows = [["tokens", *(f"{tokens:,.0f}" for tokens in chosen)]]
  for arm, words in ARMS.items():
    losses = [loss_at(results, arm, tokens) for tokens in chosen]
    if any(losses):
      rows.append([words, *map(shown, losses)])
  return rows


def _overtaking(results: Results) -> list[list[str]]:
  """From how many tokens on AKI-Pro lies below FPI, a seed a column."""
  seeds = results["seeds"]
  rows = [["", *(f"seed {seed}" for seed in seeds)]]
  for arm in ("aki_pro", "aki_pro_own_layer", "fpi_noise"):
    for other in ("fpi", "fpi_noise", "lemon"):
      if arm == other:
        continue
      cells = []
      for seed in seeds:
        mine = curves(results, arm).get(seed)
        others = curves(results, other).get(seed)
        if mine is None or others is None:
          cells.append("-")
          continue
        tokens = statistics.overtaken_at(mine, others)
        cells.append("never" if tokens is None else f"{tokens:,.0f} tokens")
      if set(cells) != {"-"}:
        rows.append([f"{ARMS[arm]}: below {ARMS[other]}", *cells])
  return rows


def _checks(results: Results) -> list[list[str]]:
  """FPI and AKI-Pro at other learning rates, and of a shorter source."""
  rows = [["", "FPI", "AKI-Pro", "AKI-Pro lies below from"]]
  for suffix, words in (
    ("", "as above"),
    ("_half_rate", "half the learning rate"),
    ("_twice_rate", "twice the learning rate"),
    ("_source_third", "a source trained a third as long"),
  ):
    names = [f"fpi{suffix}", f"aki_pro{suffix}"]
    both = [curves(results, name) for name in names]
    shared = [seed for seed in both[0] if seed in both[1]]
    if not shared:
      continue
    fpi, aki = (found[shared[0]] for found in both)
    tokens = statistics.overtaken_at(aki, fpi)
    rows.append(
      [
        words,
        f"{fpi[0][1]:.3f} -> {fpi[-1][1]:.3f}",
        f"{aki[0][1]:.3f} -> {aki[-1][1]:.3f}",
        "never" if tokens is None else f"{tokens:,.0f} tokens",
      ]
    )
  return rows


if __name__ == "__main__":
  pages.rewrite(sys.argv[1:], write)
