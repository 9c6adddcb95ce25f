"""The two depth rules, by hand and on the paper's sizes."""

from __future__ import annotations

import pytest

from aquila_jax.growth import depth


@pytest.mark.parametrize(
  ("rule", "num_source", "num_target", "expected"),
  [
    ("interpolate", 4, 6, [0, 0, 1, 2, 2, 3]),
    ("interpolate", 2, 4, [0, 0, 1, 1]),
    ("interpolate", 3, 3, [0, 1, 2]),
    ("stack", 4, 6, [0, 1, 2, 3, 0, 1]),
    ("stack", 2, 4, [0, 1, 0, 1]),
  ],
)
def test_source_layer_of_every_target_layer(
  rule, num_source, num_target, expected
):
  found = depth.depth_map(rule, num_source, num_target)
  assert found.source.tolist() == expected
  assert found.uses_all


def test_the_papers_growth_doubles_every_fourth_layer():
  doubled = depth.interpolate(32, 40)
  assert [k for k, c in enumerate(doubled.counts) if c == 2] == list(
    range(0, 32, 4)
  )
  assert set(doubled.counts) == {1, 2}
