"""The tables of a report: as rows of text first, then as HTML or plain."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from aquila_jax.evaluation import formats
from aquila_jax.evaluation.markup import Markup, element
from aquila_jax.evaluation.results import METHOD_NAMES, ReportInput, StageResult
from aquila_jax.evaluation.scores import LanguageScore, Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Cells as text; the first column and those named in `words` are words."""

  columns: tuple[str, ...]
  rows: list[tuple[str, ...]]
  words: tuple[str, ...] = ()

  def is_number(self, i: int) -> bool:
    return i > 0 and self.columns[i] not in self.words

  def html(self) -> Markup:
    """A `table` that scrolls by itself where the page is narrow."""
    head = element("tr", *self._cells("th", self.columns, scope="col"))
    body = [element("tr", *self._cells("td", row)) for row in self.rows]
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="table")

  def _cells(
    self, name: str, values: Sequence[str], **attributes: str
  ) -> list[Markup]:
    return [
      element(
        name,
        value,
        class_="number" if self.is_number(i) else None,
        **attributes,
      )
      for i, value in enumerate(values)
    ]

  def plain(self, title: str) -> str:
    """For a terminal, without colours."""
    table = RichTable(
      title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False
    )
    for i, column in enumerate(self.columns):
      justify = "right" if self.is_number(i) else "left"
      table.add_column(column, justify=justify, no_wrap=True)
    for row in self.rows:
      table.add_row(*row)
    out = io.StringIO()
    # Wide enough for any row: it is the terminal that wraps.
    Console(file=out, width=240, color_system=None, markup=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


def stage_table(report: ReportInput) -> Table:
  """Size and cost of every stage."""
  return Table(
    columns=(
      "stage",
      "transform",
      "parameters",
      "active",
      "steps",
      "tokens",
      "FLOPs/token",
      "FLOPs",
      "with ancestors",
      "time",
      "tokens/s",
      "goodput",
    ),
    rows=[
      (
        _name(stage),
        stage.transform,
        formats.in_words(stage.parameters),
        formats.in_words(stage.active_parameters),
        f"{stage.steps:,}",
        formats.in_words(stage.tokens),
        formats.in_words(stage.flops_per_token),
        formats.scientific(stage.flops),
        formats.scientific(stage.flops_before + stage.flops),
        formats.duration(stage.wall_s),
        f"{stage.tokens_per_s:,.0f}",
        "-" if stage.goodput is None else f"{100 * stage.goodput:.0f} %",
      )
      for stage in report.stages
    ],
    words=("transform",),
  )


def _name(stage: StageResult) -> str:
  if stage.is_control and stage.name != "control":
    return f"{stage.name} (control)"
  return stage.name


def evaluation_table(report: ReportInput) -> Table:
  """Scores of every stage: a row a stage and language."""
  rows = []
  for stage in report.stages:
    if stage.evaluation is None:
      continue
    for i, row in enumerate(scores_table(stage.evaluation).rows):
      rows.append((stage.name if i == 0 else "", *row))
  return Table(
    columns=("stage", *_SCORE_COLUMNS), rows=rows, words=("language",)
  )


_SCORE_COLUMNS = (
  "language",
  "loss, nats/token",
  "perplexity",
  "bits per byte",
  "tokens",
  "bytes",
)


def scores_table(scores: Scores) -> Table:
  """The scores of one model: a row a language, and all of several."""
  named = dict(scores.languages)
  if len(named) > 1:
    named["all"] = scores.overall
  return Table(
    columns=_SCORE_COLUMNS,
    rows=[(language, *_score(score)) for language, score in named.items()],
  )


def _score(score: LanguageScore) -> tuple[str, ...]:
  return (
    formats.loss(score.loss),
    f"{score.perplexity:,.2f}",
    f"{score.bits_per_byte:.3f}",
    f"{score.tokens:,}",
    f"{score.bytes:,}",
  )


def transform_table(report: ReportInput) -> Table | None:
  """Validation losses around every transform."""
  rows = []
  for stage in report.stages:
    source = stage.transform_losses.get("source")
    for i, (name, loss) in enumerate(stage.transform_losses.items()):
      change = ""
      if source is not None and name != "source":
        change = formats.signed(loss - source)
      rows.append(
        (
          stage.name if i == 0 else "",
          _method(stage, name),
          formats.loss(loss),
          change,
        )
      )
  if not rows:
    return None
  return Table(
    columns=("stage", "method", "loss, nats/token", "change"),
    rows=rows,
    words=("method",),
  )


def _method(stage: StageResult, name: str) -> str:
  words = METHOD_NAMES.get(name, name)
  return f"{words} (used)" if name == stage.method else words


def record_table(title: str, record: Mapping[str, Any]) -> Table:
  """A record of any fields as two columns; nested ones as dotted names."""
  rows = [(name, value(item)) for name, item in flat(record)]
  return Table(columns=(title, "value"), rows=rows, words=("value",))


def flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  """Name and value of every leaf, nested names with a dot."""
  leaves = []
  for name, item in record.items():
    if isinstance(item, Mapping):
      leaves += flat(item, f"{prefix}{name}.")
    else:
      leaves.append((f"{prefix}{name}", item))
  return leaves


def value(item: Any) -> str:
  """A leaf as text: numbers with separators, lists by commas."""
  if isinstance(item, bool) or item is None or isinstance(item, str):
    return str(item)
  if isinstance(item, int):
    return f"{item:,}"
  if isinstance(item, float):
    return f"{item:,.4g}" if abs(item) < 1e6 else formats.scientific(item)
  if isinstance(item, list | tuple) and not any(
    isinstance(part, list | tuple | Mapping) for part in item
  ):
    return ", ".join(map(value, item))
  return json.dumps(item, ensure_ascii=False, default=str)
