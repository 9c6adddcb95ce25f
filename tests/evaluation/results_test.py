"""Curves over a lineage."""

from __future__ import annotations

import dataclasses
import math

import pytest

from aquila_jax.evaluation.results import Point, smooth, thin
from tests.evaluation import tiny


def points(values):
  return [Point(float(i), 10.0 * i, v) for i, v in enumerate(values)]


def test_curves_begin_where_the_ancestors_ended():
  stage = tiny.experiment().stages[1]
  assert stage.curve("loss") == [
    Point(4e10, 80.0, 4.0),
    Point(5e10, 100.0, 3.0),
    Point(6e10, 120.0, 2.8),
  ]


def test_rows_without_a_finite_value_are_left_out():
  stage = tiny.stage("x")
  rows = [dict(row) for row in stage.rows]
  rows[0]["loss"], rows[1]["loss"] = None, math.inf
  stage = dataclasses.replace(stage, rows=rows)
  assert [p.value for p in stage.curve("loss")] == [3.0]
  assert stage.curve("no_such_field") == []


def test_validations_between_rows_are_placed_between_them():
  stage = tiny.stage("x", validation=[dict(step=15, loss=4.5)], flops_before=7)
  assert stage.validation_curve() == [Point(1.5e10 + 7, 30.0, 4.5)]


def test_validations_that_say_their_flops_are_taken_at_their_word():
  row = dict(step=15, loss=4.5, flops=5.0, wall_s=6.0)
  stage = tiny.stage("x", validation=[row])
  assert stage.validation_curve() == [Point(5.0, 6.0, 4.5)]


def test_the_lineage_is_the_chain_of_parents_without_the_control():
  report = tiny.experiment()
  assert [s.name for s in report.lineage] == ["dense", "scale_up", "mixture"]
  assert [s.name for s in report.controls] == ["control"]
  assert report.languages == ["en", "zh"]


def test_a_stage_off_the_chain_is_not_of_the_lineage():
  report = tiny.experiment()
  side = tiny.stage("side", parent="dense")
  first, *rest = report.stages
  report = dataclasses.replace(report, stages=[first, side, *rest])
  assert [s.name for s in report.lineage] == ["dense", "scale_up", "mixture"]


@pytest.mark.parametrize(
  ("name", "title"),
  [("scale_up", "scale up, AKI-Pro"), ("wider", "wider: scale up, AKI-Pro")],
)
def test_a_title_says_no_word_twice(name, title):
  assert tiny.stage(name, kind="scale_up", method="aki_pro").title == title


def test_smoothing_is_centred_and_keeps_straight_lines():
  line = points([2.0 * i + 1 for i in range(100)])
  averages, window = smooth(line)
  assert window == 5  # 100 / 25 = 4, made odd
  for found, expected in zip(averages, line, strict=True):
    assert found == pytest.approx(expected, rel=1e-12)


def test_smoothing_averages_the_window():
  values = [0.0] * 50 + [5.0] + [0.0] * 49
  averages, _ = smooth(points(values))
  assert [p.value for p in averages[47:54]] == [0, 1, 1, 1, 1, 1, 0]


def test_thinning_keeps_the_mean_and_the_limit():
  curve = points([float(i % 7) for i in range(1000)])
  thinned = thin(curve, limit=100)
  assert len(thinned) == 100
  assert thinned[0] == pytest.approx(
    (4.5, 45.0, sum(i % 7 for i in range(10)) / 10)
  )
  assert thin(curve, limit=1000) == curve
  assert thin([]) == []
