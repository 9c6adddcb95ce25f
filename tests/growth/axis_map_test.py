"""Index maps by hand, and the rule of the three roles."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.axes import LeafAxes, neither, reads, writes
from aquila_jax.growth import axis_map
from aquila_jax.growth.axis_map import AxisMap
from aquila_jax.growth.optimizer_state import FIRST_MOMENT, SECOND_MOMENT


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


@pytest.mark.parametrize(
  "powers",
  [axis_map.PARAMETERS, FIRST_MOMENT, SECOND_MOMENT],
)
def test_every_element_is_its_source_divided_by_role(powers):
  axes = LeafAxes((neither("layer"), reads("embed"), writes("mlp")))
  maps = {
    "layer": _given([0, 0, 1], 2),
    "embed": axis_map.circular(3, 5),
    "mlp": _given([1, 0, 1, 1], 2),
  }
  leaf = np.arange(12.0).reshape(2, 3, 2) + 1
  grown = np.asarray(axis_map.map_axes(leaf, axes, maps, powers=powers))
  read_counts, write_counts = [2, 2, 1], [1, 3]
  assert grown.shape == (3, 5, 4)
  for layer, i, j in itertools.product(range(3), range(5), range(4)):
    sl, si, sj = [0, 0, 1][layer], i % 3, [1, 0, 1, 1][j]
    divisor = (
      read_counts[si] ** powers.reads * write_counts[sj] ** powers.writes
    )
    assert grown[layer, i, j] == pytest.approx(
      leaf[sl, si, sj] / divisor, rel=1e-15
    )


def test_a_square_leaf_reads_its_first_and_writes_its_second_dimension():
  axes = LeafAxes((reads("embed"), writes("embed")))
  leaf = np.array([[1.0, 2.0], [3.0, 4.0]])
  maps = {"embed": axis_map.circular(2, 4)}
  grown = axis_map.map_axes(leaf, axes, maps)
  assert np.array_equal(grown, np.tile([[0.5, 1.0], [1.5, 2.0]], (2, 2)))


def test_bfloat16_is_rounded_once():
  axes = LeafAxes((reads("embed"),))
  leaf = np.array([1.0, 2.0, 3.0], jnp.bfloat16)
  maps = {"embed": axis_map.circular(3, 9)}
  grown = axis_map.map_axes(leaf, axes, maps)
  assert grown.dtype == jnp.bfloat16
  expected = (leaf.astype(np.float32) / np.float32(3)).astype(jnp.bfloat16)
  assert np.array_equal(grown[:3], expected)


def test_axes_without_a_map_stay():
  axes = LeafAxes((reads("embed"), writes("vocab")))
  leaf = np.array([[1.0, 2.0, 3.0]])
  maps = {"embed": axis_map.circular(1, 2)}
  grown = axis_map.map_axes(leaf, axes, maps)
  assert np.array_equal(grown, [[0.5, 1.0, 1.5]] * 2)


def test_sizes_are_read_off_the_declarations():
  axes = {
    "a": LeafAxes((reads("embed"), writes("mlp"))),
    "b": LeafAxes((writes("embed"),)),
  }
  shapes = {"a": jnp.zeros((2, 5)), "b": jnp.zeros(2)}
  assert axis_map.axis_sizes(axes, shapes) == {"embed": 2, "mlp": 5}
