"""What reproductions share: means, intervals, pages."""

from __future__ import annotations

import math

import pytest

from benchmarks.reproduction import pages
from benchmarks.reproduction.statistics import mean_curve, paired, spread


def test_spread_has_mean_deviation_and_students_interval():
  found = spread([1.0, 2.0, 6.0])
  assert found is not None
  assert (found.mean, found.half_range) == (3.0, 2.5)
  # (4 + 1 + 9) / 2 = 7; t of two degrees of freedom is 4.303.
  assert found.deviation == pytest.approx(math.sqrt(7))
  reach = 4.303 * math.sqrt(7 / 3)
  assert found.interval == pytest.approx((3 - reach, 3 + reach))
  assert found.in_words() == "3.000 ± 2.500"
  assert found.with_deviation() == "3.000 ± 2.646"
  assert found.with_interval() == "+3.000 ± 2.646 [-3.573, +9.573]"


def test_one_seed_has_no_deviation_and_none_has_no_spread():
  found = spread([-0.0001])
  assert found is not None
  assert found.deviation is None and found.interval is None
  assert found.in_words() == found.with_deviation() == "0.000"
  assert found.with_interval() == "+0.000"
  assert spread([]) is None


def test_paired_takes_the_seeds_that_both_have():
  found = paired({"0": 5.0, "1": 4.0, "2": 1.0}, {"0": 3.0, "1": 3.0})
  assert found is not None
  assert found.values == (2.0, 1.0)
  assert paired({"0": 1.0}, {}) is None


def test_mean_curve_ends_where_the_shortest_does():
  assert mean_curve([[[0, 4.0], [9, 2.0]], [[0, 2.0]]]) == [[0, 3.0]]


def test_a_table_without_rows_says_so():
  assert pages.table([["arm", "loss"]], left=1) == "Not measured yet."
  text = pages.table([["arm", "loss"], ["dense", "3.1"]], left=1)
  assert text == "| arm | loss |\n| --- | --: |\n| dense | 3.1 |"
