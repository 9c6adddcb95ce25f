"""The page of a reproduction's results: a frame, tables, words, and a figure.

page.md in a reproduction's folder has the frame, words.md what a person makes
of the numbers.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from benchmarks.reproduction.statistics import Results, Spread

Rows = list[list[str]]


def write(
  path: pathlib.Path,
  *,
  drawing: str,
  render: Callable[[str], str],
) -> None:
  """Writes a page, and its figure beside it.

  Args:
    path: of the page.
    drawing: the text of the figure.
    render: the page, from the name of the figure.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  figure = path.with_suffix(".svg")
  figure.write_text(drawing, encoding="utf-8")
  path.write_text(render(figure.name), encoding="utf-8")


def filled(folder: pathlib.Path, values: Mapping[str, str]) -> str:
  """The frame of a folder with its values, and with its words as {words}."""
  words = (folder / "words.md").read_text(encoding="utf-8").strip()
  text = (folder / "page.md").read_text(encoding="utf-8")
  for name, value in {**values, "words": words}.items():
    text = text.replace("{" + name + "}", value)
  return text


def where_measured(results: Results) -> dict[str, str]:
  """Values of every frame: date, machine and versions."""
  return {
    "date": results["date"],
    "machine": ", ".join(f"{k}: {v}" for k, v in results["machine"].items()),
    "versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
  }


def seeds_with(results: Results, arms: Sequence[str]) -> int:
  """How many seeds have all of these arms."""
  return sum(
    all(arm in found["stages"] for arm in arms)
    for found in results["seeds"].values()
  )


def tokens_per_s(results: Results, name: str, tokens: float) -> str:
  """The mean over the seeds of a stage of so many tokens; "-" where none."""
  rates = [
    tokens / found["stages"][name]["wall_s"]
    for found in results["seeds"].values()
    if name in found["stages"] and found["stages"][name]["wall_s"]
  ]
  return f"{sum(rates) / len(rates):,.0f}" if rates else "-"


def shown(found: Spread | None) -> str:
  """Mean and half of the range; "-" where nothing was measured."""
  return found.in_words() if found else "-"


def table(rows: Rows, *, left: int) -> str:
  """Rows of cells, the first of them the names of the columns.

  Args:
    rows: of as many cells each.
    left: so many columns stand at the left, the others are numbers.

  Returns:
    Markdown; a line that says so where there are no rows.
  """
  if len(rows) < 2:
    return "Not measured yet."
  head, *body = rows
  marks = ["---"] * left + ["--:"] * (len(head) - left)
  return "\n".join(f"| {' | '.join(r)} |" for r in (head, marks, *body))


def rewrite(
  arguments: Sequence[str], write_page: Callable[[Results, pathlib.Path], None]
) -> None:
  """The command of a page module: RESULTS PAGE."""
  results, page = map(pathlib.Path, arguments)
  write_page(json.loads(results.read_text(encoding="utf-8")), page)
