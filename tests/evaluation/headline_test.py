"""The headline in every outcome, with numbers checked by hand."""

from __future__ import annotations

import math

import pytest

from aquila_jax.evaluation.headline import Headline, headline
from tests.evaluation import tiny

# Of the final stage: 2.5 nats at 9e10 FLOPs and 180 s, ancestors included.
FINAL = tiny.experiment().stages[2]


def against(losses: list[float], *, step_flops: float = 3e9) -> Headline:
  control = tiny.stage(
    "control", is_control=True, rows=tiny.rows(losses, step_flops=step_flops)
  )
  result = headline(FINAL, control)
  assert result is not None
  return result


def test_a_control_that_does_not_reach_the_loss():
  result = against([6.0, 4.0, 3.0])
  assert result.outcome == "ahead"
  assert not result.reached
  assert result.control_flops is None
  assert result.flops_ratio == 1.0
  assert result.loss_difference == 0.5
  assert result.title == (
    "The control did not reach EfficientScale's loss with the same FLOPs"
  )
  assert result.sentences == [
    "EfficientScale (mixture) ended at a validation loss of 2.500 nats/token"
    " after 9.00 × 10¹⁰ training FLOPs, all ancestors included, in 3 min 00 s"
    " of training.",
    "The control (control) did not reach it within 9.00 × 10¹⁰ FLOPs; it ended"
    " at 3.000.",
    "At EfficientScale's number of FLOPs the control's loss was 3.000, 0.500"
    " nats/token higher.",
  ]


def test_a_control_that_does_not_reach_it_with_more_flops():
  result = against([6.0, 4.0, 3.0, 2.9, 2.8])
  assert result.flops_ratio == pytest.approx(5 / 3)
  assert result.title == (
    "The control did not reach EfficientScale's loss with 1.67 times the FLOPs"
  )


def test_a_control_that_needs_more():
  # 2.7 at 9e10 and 2.3 at 12e10: 2.5 lies half way, at 10.5e10.
  result = against([6.0, 4.0, 2.7, 2.3])
  assert result.outcome == "ahead"
  assert result.control_flops == pytest.approx(1.05e11, rel=1e-12)
  assert result.control_wall_s == pytest.approx(70.0, rel=1e-12)
  assert result.loss_difference == pytest.approx(0.2, rel=1e-12)
  assert result.title == (
    "The control needed 1.17 times the FLOPs of EfficientScale for the same"
    " loss"
  )


def test_a_control_that_needs_less():
  # 3.0 at 3e10 and 2.0 at 6e10: half way is 4.5e10, half of 9e10.
  result = against([3.0, 2.0, 1.5])
  assert result.outcome == "behind"
  assert result.control_flops == pytest.approx(4.5e10, rel=1e-12)
  assert result.flops_ratio == pytest.approx(0.5, rel=1e-12)
  assert result.loss_difference == -1.0
  assert result.title == (
    "The control reached EfficientScale's loss with 0.50 times its FLOPs:"
    " EfficientScale lost this comparison"
  )
  assert result.sentences[1:] == [
    "The control (control) first came down to it after 4.50 × 10¹⁰ FLOPs, 0.50"
    " times as many, in 30 s of training; it ended at 1.500 after 9.00 × 10¹⁰"
    " FLOPs.",
    "At EfficientScale's number of FLOPs the control's loss was 1.500, 1.000"
    " nats/token lower.",
  ]


def test_a_control_that_ends_on_the_same():
  result = against([6.0, 4.0, 2.5])
  assert (result.outcome, result.flops_ratio) == ("even", 1.0)
  assert result.title == (
    "The control reached EfficientScale's loss with about the same FLOPs: no"
    " saving was measured"
  )
  assert result.sentences[2] == (
    "At EfficientScale's number of FLOPs the control's loss was 2.500, the same"
    " to three decimals."
  )


def test_a_control_that_stopped_too_early_decides_nothing():
  result = against([6.0, 4.0, 3.0], step_flops=1.5e9)
  assert result.outcome == "open"
  assert result.loss_difference is None
  assert result.title == (
    "The control did not reach EfficientScale's loss, but had only 0.50 times"
    " its FLOPs"
  )
  assert result.sentences[2] == (
    "The control has no validation at EfficientScale's number of FLOPs, so"
    " there is no loss to compare at equal compute."
  )


def test_the_first_crossing_counts_even_where_the_loss_rises_again():
  result = against([3.0, 2.0, 2.9])
  assert result.control_flops == pytest.approx(4.5e10, rel=1e-12)


def test_a_control_that_begins_below_says_that_it_may_have_been_earlier():
  result = against([2.0, 1.9, 1.8])
  assert result.at_first_validation
  assert result.control_flops == 3e10
  assert result.sentences[1].startswith(
    "The control (control) first came down to it by its first validation,"
    " 3.00 × 10¹⁰ FLOPs, 0.33 times as many,"
  )


def test_losses_that_are_not_finite_are_passed_over():
  result = against([6.0, math.nan, 3.0])
  assert result.control_end_loss == 3.0
  assert result.loss_difference == 0.5


def test_without_validations_there_is_no_headline():
  silent = tiny.stage("control", is_control=True, validation=[])
  assert headline(FINAL, silent) is None
  assert headline(silent, FINAL) is None
