"""The terminal's table and summary.json."""

from __future__ import annotations

import json
import math

from aquila_jax.evaluation import summary
from tests.evaluation import tiny


def test_the_terminal_shows_the_numbers_of_the_report():
  lines = summary.summary_table(tiny.experiment(name="tiny")).splitlines()
  stages = [line.split() for line in lines if line.startswith(" mixture")]
  assert stages[0] == (
    "mixture 327K 120K 30 3.00K 9.00 × 10¹⁰ 1 min 00 s 50 75 % 2.500".split()
  )
  assert stages[1] == "mixture en 2.500 12.18 1.202 1,000 3,000".split()
  assert (
    "The control did not reach EfficientScale's loss with the same FLOPs."
    in lines
  )
  tables = lines[: lines.index("tiny: test split")]
  assert max(map(len, tables)) <= 110


def test_json_is_strict_even_of_losses_that_are_not():
  stage = tiny.stage("x", transform_losses={"source": math.inf})
  tree = summary.summary(tiny.experiment(stages=[stage]))
  text = json.dumps(tree, allow_nan=False)
  found = json.loads(text)["stages"][0]
  assert found["transform_losses"] == {"source": None}
  assert found["flops_with_ancestors"] == 3e10
  assert found["validation_loss"] == 3.0
  assert found["spent_s"] == {"steps": 54.0, "compile": 12.0, "other": 6.0}


def test_of_a_run_before_it_was_measured_there_is_no_goodput():
  report = tiny.experiment(stages=[tiny.stage("old", spent_s={})])
  line = summary.summary_table(report).splitlines()[4]
  assert line.split()[-2:] == ["-", "3.000"]


def test_json_holds_the_headline():
  found = summary.summary(tiny.experiment())["headlines"]
  assert len(found) == 1
  assert found[0]["outcome"] == "ahead"
  assert found[0]["control_flops"] is None
  assert found[0]["control_end_flops"] == 9e10


def test_without_a_control_there_is_no_headline():
  report = tiny.experiment(stages=tiny.experiment().stages[:3])
  assert summary.headlines(report) == []
  assert "control" not in summary.summary_table(report)
