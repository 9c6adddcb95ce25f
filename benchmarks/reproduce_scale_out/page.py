"""The page of the results: every number in it is computed here.

  python -m benchmarks.reproduce_scale_out.page RESULTS PAGE

page.md beside this file has the frame, words.md what a person makes of it.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.reproduce_scale_out import catching_up, figure, of_experts
from benchmarks.reproduction import pages
from benchmarks.reproduction.pages import Rows, table
from benchmarks.reproduction.statistics import (
  Results,
  Spread,
  curves,
  paired,
  spread,
)

ARMS = {
  "dense": "dense, continued",
  "sparse_upcycling": "sparse upcycling",
  "drop_25": "Drop-Upcycling, 0.25 redrawn",
  "drop_50": "Drop-Upcycling, 0.5 redrawn",
  "drop_100": "Drop-Upcycling, all redrawn",
  "granular": "granular, 4 shards x 8 copies",
  "noise": "copies with noise",
  "shared": "a shared half, 15 routed halves",
  "scratch": "from scratch, longer",
}
_STAGES = {"source": "source", **ARMS}
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
  models = results["models"]
  dense = models["dense"]
  arm, source = dense["flops"], models["source"]["flops"]
  values = {
    **pages.where_measured(results),
    "done": f"Done so far: {pages.seeds_with(results, results['arms'])} seeds.",
    "layers": str(dense["layers"]),
    "width": str(dense["width"]),
    "step_tokens": f"{dense['tokens'] // dense['steps']:,}",
    "arm_flops": f"{arm:.3g}",
    "of_source": f"{arm / source:.2f}",
    "off": f"{_largest_offset(models):.2f}",
    "models": table(_models(results), left=2),
    "losses": table(_losses(results), left=1),
    "against_dense": table(_differences(results, "dense"), left=1),
    "against_sparse": table(_differences(results, "sparse_upcycling"), left=1),
    "scratch_times": f"{models['scratch']['flops'] / arm:.2f}",
    "farthest": f"{catching_up.FARTHEST:g}",
    "catching_up": table(_catching_up(results), left=1),
    "between": table(of_experts.cosines(results, ARMS, "between"), left=1),
    "parent": table(of_experts.cosines(results, ARMS, "parent"), left=1),
    "balance": table(of_experts.balance(results, ARMS), left=1),
    "figure": figure_name,
  }
  return pages.filled(_HERE, values)


def _largest_offset(models: Mapping[str, Any]) -> float:
  """How far the FLOPs of an arm are from those of `dense`, in its own steps."""
  dense = models["dense"]["flops"]
  return max(
    abs(models[arm]["flops"] - dense) / models[arm]["step_flops"]
    for arm in ARMS
    if arm in models and arm != "scratch"
  )


def _models(results: Results) -> Rows:
  rows = [
    [
      "",
      "experts",
      "FFN units",
      "parameters",
      "active",
      "peak rate",
      "steps, of them warm-up",
      "tokens",
      "FLOPs, of dense's",
      "tokens/s, mean",
    ]
  ]
  models = results["models"]
  for name, words in _STAGES.items():
    if name not in models:
      continue
    size = models[name]
    experts = f"{size['top_k']} of {size['experts']}" if size["experts"] else ""
    units = str(size["FFN"])
    if size["shared"]:
      units += f", shared {size['shared']}"
    rows.append(
      [
        words,
        experts,
        units,
        f"{size['parameters']:,}",
        f"{size['active']:,}",
        f"{size['learning_rate']:g}",
        f"{size['steps']:,}, {size['warmup_steps']}",
        f"{size['tokens']:,}",
        f"{size['flops'] / models['dense']['flops']:.4f}",
        pages.tokens_per_s(results, name, size["tokens"]),
      ]
    )
  return rows


def losses_of(
  results: Results, arm: str, split: str, language: str = "overall"
) -> dict[str, float]:
  """The last losses of an arm, by seed.

  Args:
    results: of `collected.collect`.
    arm: its name, or "source".
    split: validation or test.
    language: or all of them together.

  Returns:
    Those that were measured.
  """
  found = {}
  for seed, measured in results["seeds"].items():
    scores = measured["stages"].get(arm, {}).get(split) or {}
    if language in scores:
      found[seed] = scores[language]
  return found


def _languages(results: Results) -> list[str]:
  """The languages of the validations, in order."""
  names = {
    name: None
    for found in results["seeds"].values()
    for stage in found["stages"].values()
    for name in stage["validation"]
  }
  return [name for name in names if name != "overall"]


def _losses(results: Results) -> Rows:
  columns = [
    (split, language)
    for split in ("validation", "test")
    for language in ("overall", *_languages(results))
  ]
  heads = [f"{s}, {n}".removesuffix(", overall") for s, n in columns]
  rows = [["", "right after its start", *heads]]
  for name, words in _STAGES.items():
    measured = [
      spread(list(losses_of(results, name, *column).values()))
      for column in columns
    ]
    if any(measured):
      starts = spread(
        [
          found["stages"][name]["start"]
          for found in results["seeds"].values()
          if found["stages"].get(name, {}).get("start") is not None
        ]
      )
      rows.append([words, *map(_shown, (starts, *measured))])
  return rows


def _shown(found: Spread | None) -> str:
  return found.with_deviation() if found else "-"


def _differences(results: Results, other: str) -> Rows:
  """Of the last losses, seed by seed, from those of another arm."""
  splits = ("validation", "test")
  rows = [["", *splits, *(f"{split}, each seed" for split in splits)]]
  for arm, words in ARMS.items():
    if arm == other:
      continue
    found = [
      paired(losses_of(results, arm, s), losses_of(results, other, s))
      for s in splits
    ]
    if any(found):
      cells = [f.with_interval() if f else "-" for f in found]
      each = [
        ", ".join(f"{value:+.3f}" for value in f.values) if f else "-"
        for f in found
      ]
      rows.append([words, *cells, *each])
  return rows


def _catching_up(results: Results) -> Rows:
  """Of every arm, where scratch of the same seed reaches its last loss."""
  seeds, scratch = results["seeds"], curves(results, "scratch")
  rows = [
    [
      "",
      *(f"seed {seed}" for seed in seeds),
      "mean where all measured",
      "scratch above at as many FLOPs",
      "scratch above at its end",
    ]
  ]
  for arm, words in ARMS.items():
    last = losses_of(results, arm, "validation")
    shared = [seed for seed in seeds if seed in last and seed in scratch]
    if arm == "scratch" or not shared:
      continue
    spent = results["models"][arm]["flops"]
    catches = {s: catching_up.caught_up(scratch[s], last[s]) for s in shared}
    cells = [
      _in_words(catches.get(seed), scratch.get(seed), spent) for seed in seeds
    ]
    measured = [
      c.flops / spent
      for c in catches.values()
      if c.flops is not None and c.interval is None
    ]
    whole = spread(measured) if len(measured) == len(shared) else None
    along = {s: catching_up.at(scratch[s], spent) for s in shared}
    there = {s: loss for s, loss in along.items() if loss is not None}
    ends = {s: scratch[s][-1][1] for s in shared}
    rows.append(
      [words, *cells, _times(whole)]
      + [_interval(paired(losses, last)) for losses in (there, ends)]
    )
  return rows


def _in_words(
  catch: catching_up.Catch | None,
  scratch: list[list[float]] | None,
  spent: float,
) -> str:
  if catch is None or scratch is None:
    return "-"
  words = catch.in_words(spent)
  return words or f"not within {scratch[-1][0] / spent:.2f} times"


def _times(found: Spread | None) -> str:
  if found is None:
    return "-"
  if found.deviation is None:
    return f"{found.mean:.2f}"
  return f"{found.mean:.2f} ± {found.deviation:.2f}"


def _interval(found: Spread | None) -> str:
  return found.with_interval() if found else "-"


if __name__ == "__main__":
  pages.rewrite(sys.argv[1:], write)
