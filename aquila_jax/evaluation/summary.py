"""The numbers of a report for the terminal and for other programs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from aquila_jax.evaluation import formats, tables
from aquila_jax.evaluation.headline import Headline, headline
from aquila_jax.evaluation.results import ReportInput, StageResult


def headlines(report: ReportInput) -> list[Headline]:
  """The final stage against every control, where both have validations."""
  final = report.final
  if final is None:
    return []
  compared = [headline(final, control) for control in report.controls]
  return [result for result in compared if result is not None]


def summary_table(report: ReportInput) -> str:
  """Stages, evaluation and headline as plain text of several lines."""
  parts = [tables.Table.plain(_short_stages(report), f"{report.name}: stages")]
  scores = tables.evaluation_table(report)
  if scores.rows:
    parts.append(scores.plain(f"{report.name}: {report.split} split"))
  for result in headlines(report):
    parts.append("\n".join([result.title + ".", *result.sentences]))
  return "\n\n".join(parts)


def _short_stages(report: ReportInput) -> tables.Table:
  """Narrow enough for a terminal of 100 columns."""
  full = tables.stage_table(report)
  dropped = {"transform", "FLOPs/token", "FLOPs"}
  kept = [i for i, name in enumerate(full.columns) if name not in dropped]
  rows = []
  for stage, row in zip(report.stages, full.rows, strict=True):
    curve = stage.validation_curve()
    last = formats.loss(curve[-1].value) if curve else "-"
    rows.append((*(row[i] for i in kept), last))
  columns = [full.columns[i] for i in kept]
  return tables.Table(
    columns=tuple(
      "FLOPs*" if name == "with ancestors" else name for name in columns
    )
    + ("val. loss",),
    rows=rows,
  )


def summary(report: ReportInput) -> dict[str, Any]:
  """What summary.json holds: plain JSON, no NaN."""
  return {
    "name": report.name,
    "headlines": [_headline(result) for result in headlines(report)],
    "stages": [_stage(stage) for stage in report.stages],
    "machine": dict(report.machine),
    "versions": dict(report.versions),
  }


def _headline(result: Headline) -> dict[str, Any]:
  return dataclasses.asdict(result) | {
    "title": result.title,
    "outcome": result.outcome,
    "reached": result.reached,
    "flops_ratio": result.flops_ratio,
    "loss_difference": result.loss_difference,
  }


def _stage(stage: StageResult) -> dict[str, Any]:
  curve = stage.validation_curve()
  scores = None
  if stage.evaluation is not None:
    scores = _finite(stage.evaluation.to_json())
  return {
    "name": stage.name,
    "kind": stage.kind,
    "method": stage.method,
    "parent": stage.parent,
    "is_control": stage.is_control,
    "parameters": stage.parameters,
    "active_parameters": stage.active_parameters,
    "flops_per_token": stage.flops_per_token,
    "steps": stage.steps,
    "tokens": stage.tokens,
    "flops": stage.flops,
    "flops_with_ancestors": stage.flops_before + stage.flops,
    "wall_s": stage.wall_s,
    "spent_s": dict(stage.spent_s),
    "validation_loss": curve[-1].value if curve else None,
    "transform_losses": _finite(dict(stage.transform_losses)),
    "evaluation": scores,
  }


def _finite(tree: Any) -> Any:
  """JSON has no token for infinity and NaN: null."""
  if isinstance(tree, dict):
    return {key: _finite(value) for key, value in tree.items()}
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree
