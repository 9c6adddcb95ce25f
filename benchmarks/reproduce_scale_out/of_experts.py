"""Tables of what became of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.reproduction.pages import Rows
from benchmarks.reproduction.statistics import Results, spread

_KERNELS = ("gate", "up", "down")
_TIMES = ("start", "end")


def cosines(results: Results, names: dict[str, str], what: str) -> Rows:
  """Cosines by kernel at the start and the end, means over layers and seeds.

  Args:
    results: of `collected.collect`.
    names: words for each arm.
    what: "between" experts, or of an expert and its "parent".

  Returns:
    A row an arm; those without experts, or without a parent, are left out.
  """
  heads = [f"{kernel}, {when}" for when in _TIMES for kernel in _KERNELS]
  rows = [["", *heads]]
  for arm, words in names.items():
    cells = []
    for when in _TIMES:
      of_seeds = [row[what] for row in _rows(results, arm, when) if row[what]]
      cells += [
        _shown([_mean(found[kernel]) for found in of_seeds])
        for kernel in _KERNELS
      ]
    if set(cells) != {"-"}:
      rows.append([words, *cells])
  return rows


def balance(results: Results, names: dict[str, str]) -> Rows:
  """Load at the start and the end, and how far routing has settled."""
  rows = [
    [
      "",
      *(f"largest load / mean, {when}" for when in _TIMES),
      *(f"entropy / log E, {when}" for when in _TIMES),
      "agreement",
      "of the steps",
    ]
  ]
  for arm, words in names.items():
    cells = [
      _shown([_mean(row[field]) for row in _rows(results, arm, when)])
      for field in ("max_over_mean", "entropy")
      for when in _TIMES
    ]
    found = _of_stages(results, arm, lambda stage: stage["agreement"])
    shares = [agreement["share"] for agreement in found]
    if set(cells) != {"-"} or shares:
      rows.append([words, *cells, _shown(shares), _steps(found)])
  return rows


def _rows(results: Results, arm: str, when: str) -> list[dict[str, Any]]:
  return [
    row
    for found in results["seeds"].values()
    for row in found["experts"]
    if (row["arm"], row["when"]) == (arm, when)
  ]


def _of_stages(
  results: Results, arm: str, get: Callable[[dict[str, Any]], Any]
) -> list[Any]:
  """What the seeds have of an arm, where it is there."""
  stages = [found["stages"].get(arm) for found in results["seeds"].values()]
  values = [get(stage) for stage in stages if stage]
  return [value for value in values if value is not None]


def _steps(found: list[dict[str, Any]]) -> str:
  if not found:
    return "-"
  return f"{found[0]['since_step']:,} to {found[0]['step']:,}"


def _mean(of_layers: list[float]) -> float:
  return sum(of_layers) / len(of_layers)


def _shown(values: list[float]) -> str:
  found = spread(values)
  return found.with_deviation() if found else "-"
