"""Index maps by hand, and the rule of the three roles."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.axes import LeafAxes, reads, writes
from aquila_jax.growth import axis_map
from aquila_jax.growth.axis_map import AxisMap


def _given(source, source_size) -> AxisMap:
  return AxisMap(source=np.array(source), source_size=source_size)


def test_circular_map_by_hand():
  g = axis_map.circular(3, 7)
  assert g.source.tolist() == [0, 1, 2, 0, 1, 2, 0]
  assert g.counts.tolist() == [3, 2, 2]
  assert g.divisors.tolist() == [3, 2, 2, 3, 2, 2, 3]
  assert g.new_ranges == [[3, 7]]


def test_new_indices_are_all_but_the_first_copies():
  g = _given([0, 0, 1, 2, 2, 2], 3)
  assert g.is_new.tolist() == [False, True, False, False, True, True]
  assert g.new_ranges == [[1, 2], [4, 6]]
  assert axis_map.circular(4, 4).new_ranges == []


def test_random_map_keeps_the_source_and_draws_the_rest_by_seed_and_name():
  def drawn(**fields):
    defaults: dict[str, Any] = dict(name="mlp", seed=1)
    return axis_map.random(20, 60, **(defaults | fields))

  g = drawn()
  assert g.source[:20].tolist() == list(range(20))
  assert set(g.source[20:]) <= set(range(20))
  assert len(set(g.source[20:])) > 10
  assert g.counts.sum() == 60
  assert np.array_equal(g.source, drawn().source)
  assert not np.array_equal(g.source, drawn(seed=2).source)
  assert not np.array_equal(g.source, drawn(name="embed").source)


def test_unused_source_indices_are_seen():
  assert axis_map.circular(3, 5).unused == []
  assert _given([0, 2], 3).unused == [1]


@pytest.mark.parametrize("source", [[0, 3], [-2, 0]])
def test_a_map_out_of_the_source_is_refused(source):
  with pytest.raises(AssertionError, match="copies what is not there"):
    _given(source, 3)


def test_sizes_are_read_off_the_declarations():
  axes = {
    "a": LeafAxes((reads("embed"), writes("mlp"))),
    "b": LeafAxes((writes("embed"),)),
  }
  shapes = {"a": jnp.zeros((2, 5)), "b": jnp.zeros(2)}
  assert axis_map.axis_sizes(axes, shapes) == {"embed": 2, "mlp": 5}
