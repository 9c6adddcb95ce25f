"""Loads of layers of which some have no experts."""

from __future__ import annotations

from typing import Any

from aquila_jax.evaluation.expert_plots import _worst_layer, load_maps
from tests.evaluation import tiny


def _row(step: int, loads: list[Any], largest: list[Any]) -> dict[str, Any]:
  return dict(
    step=step,
    loss=1.0,
    flops=100.0 * step,
    wall_s=2.0 * step,
    expert_load=loads,
    load_max_over_mean=largest,
  )


def test_layers_without_experts_have_no_map_and_are_not_the_worst():
  rows = [
    _row(1, [None, [0.5, 0.5], None, [1.0, 0.0]], [None, 1.0, None, 2.0]),
    _row(2, [None, [0.75, 0.25], None, [0.5, 0.5]], [None, 1.5, None, 1.0]),
  ]
  stage = tiny.stage("mixed", rows=rows, validation=[])
  found = str(load_maps(stage))
  for layer, at_the_end in ((1, "expert 0: 1.50, expert 1: 0.50"), (3, "1.00")):
    assert f"layer {layer}, at the end: " in found
    assert at_the_end in found
  assert "layer 0" not in found and "layer 2" not in found
  assert [
    (point.flops, point.wall_s, point.value)
    for point in _worst_layer(stage, "load_max_over_mean")
  ] == [(100.0, 2.0, 2.0), (200.0, 4.0, 1.5)]


def test_a_layer_whose_load_is_not_a_number_is_left_out_of_the_worst():
  rows = [_row(1, [[0.5, 0.5]], [float("nan")]), _row(2, [[0.5, 0.5]], [1.0])]
  stage = tiny.stage("mixed", rows=rows, validation=[])
  assert len(_worst_layer(stage, "load_max_over_mean")) == 1
