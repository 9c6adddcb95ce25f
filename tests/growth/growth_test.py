"""Every element of a grown slice by its formula, in one block and in many."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.axes import LeafAxes, Role, neither, reads, writes
from aquila_jax.growth import axis_map, depth, matrix
from aquila_jax.growth.axis_map import EMPTY, PARAMETERS, AxisMap, Powers
from aquila_jax.growth.growth import Growth
from aquila_jax.growth.optimizer_state import FIRST_MOMENT, SECOND_MOMENT


def _given(source, source_size, **fields) -> AxisMap:
  return AxisMap(source=np.array(source), source_size=source_size, **fields)


def _slice(growth: Growth, own: np.ndarray, axes: LeafAxes, **fields):
  defaults: dict[str, Any] = dict(
    above=own,
    powers=PARAMETERS,
    rng=np.random.default_rng(0),
    silent=False,
    dtype=own.dtype,
  )
  return growth.slice(own, axes=axes, **(defaults | fields))


def _growth(width, **fields) -> Growth:
  return Growth(width=width, layers=depth.interpolate(2, 3), **fields)


# Two axes that are read and two that are written, in runs and out of order.
WIDTH = {
  "embed": axis_map.circular(5, 8),
  "kv_head": _given([0, 1, 1, 0, 0], 2),
  "q_per_kv": axis_map.circular(3, 4),
  "mlp": _given([2, 0, 1, 1, 3, 3, 0], 4),
}
IN, OUT = (neither("layer"),), ("kv_head", "q_per_kv", "head_dim")
LEAVES = {
  "query": LeafAxes((*IN, reads("embed"), *map(writes, OUT))),
  "out": LeafAxes((*IN, *map(reads, OUT), writes("embed"))),
  "up": LeafAxes((*IN, neither("expert"), reads("embed"), writes("mlp"))),
  "bias": LeafAxes((*IN, *map(writes, OUT))),
  "head": LeafAxes((reads("embed"), writes("vocab"))),
  "table": LeafAxes((neither("vocab"), writes("embed"))),
}
OLD = dict(embed=5, kv_head=2, q_per_kv=3, head_dim=2, mlp=4, vocab=3)
POWERS = {"params": PARAMETERS, "mu": FIRST_MOMENT, "nu": SECOND_MOMENT}


def _inner(axes: LeafAxes):
  return [a for a in axes.axes if a.name not in ("layer", "expert")]


def _expected(
  own: np.ndarray,
  above: np.ndarray,
  axes: LeafAxes,
  *,
  powers: Powers,
  taking: frozenset[str],
) -> np.ndarray:
  """One element after another."""
  inner = _inner(axes)
  maps = [WIDTH.get(axis.name) for axis in inner]
  shape = [
    n if g is None else g.target_size
    for n, g in zip(own.shape, maps, strict=True)
  ]
  result = np.zeros(shape)
  for index in itertools.product(*map(range, shape)):
    place, divisor, new = [], 1, False
    for i, axis, g in zip(index, inner, maps, strict=True):
      k = i if g is None else int(g.source[i])
      place.append(k)
      if g is None:
        continue
      count = g.source.tolist().count(k)
      power = {
        Role.READS: powers.reads,
        Role.WRITES: powers.writes,
        Role.NEITHER: 0,
      }[axis.role]
      divisor *= count**power
      first = g.source.tolist().index(k) == i
      if axis.role is Role.WRITES and axis.name in taking and not first:
        new = True
    result[index] = (above if new else own)[tuple(place)] / divisor
  return result


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("taking", [(), ("mlp", "kv_head", "embed")])
@pytest.mark.parametrize("role", POWERS)
def test_every_element_is_its_source_divided_by_role(
  name, taking, role, monkeypatch
):
  axes, powers = LEAVES[name], POWERS[role]
  shape = [OLD[axis.name] for axis in _inner(axes)]
  generator = np.random.default_rng(1)
  own, above = generator.standard_normal((2, *shape))
  growth = _growth(WIDTH, from_next_layer=frozenset(taking))
  expected = _expected(
    own,
    above,
    axes,
    powers=powers,
    # Outside of the layers there is no next one.
    taking=frozenset(taking) if axes.has("layer") else frozenset(),
  )
  found = _slice(growth, own, axes, above=above, powers=powers)
  np.testing.assert_allclose(found, expected, rtol=1e-15)
  monkeypatch.setattr(matrix, "_BLOCK_ELEMENTS", 7)
  again = _slice(growth, own, axes, above=above, powers=powers)
  np.testing.assert_array_equal(again, found)


def test_bfloat16_is_rounded_once():
  axes = LeafAxes((reads("embed"), writes("vocab")))
  own = np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]], jnp.bfloat16)
  growth = _growth({"embed": axis_map.circular(3, 9)})
  grown = _slice(growth, own, axes)
  assert grown.dtype == jnp.bfloat16
  expected = (own.astype(np.float32) / np.float32(3)).astype(jnp.bfloat16)
  assert np.array_equal(grown, np.tile(expected, (3, 1)))


def test_a_square_leaf_reads_its_first_and_writes_its_second_dimension():
  axes = LeafAxes((reads("embed"), writes("embed")))
  own = np.array([[1.0, 2.0], [3.0, 4.0]])
  grown = _slice(_growth({"embed": axis_map.circular(2, 4)}), own, axes)
  assert np.array_equal(grown, np.tile([[0.5, 1.0], [1.5, 2.0]], (2, 2)))


# embed is padded from 3 to 5, and mlp has a copy, a new index and the rest.
PADDED = {
  "embed": axis_map.padded(3, 5, silent=Role.WRITES),
  "mlp": _given([0, 1, EMPTY, 1], 2, silent=Role.READS),
}
UP = LeafAxes((neither("layer"), reads("embed"), writes("mlp")))
DOWN = LeafAxes((neither("layer"), reads("mlp"), writes("embed")))


@pytest.mark.parametrize("block", [4, 2**18])
def test_new_entries_are_zero_on_the_silent_side_and_drawn_on_the_other(
  block, monkeypatch
):
  monkeypatch.setattr(matrix, "_BLOCK_ELEMENTS", block)
  growth = _growth(PADDED)
  up = _slice(growth, np.arange(1.0, 7).reshape(3, 2), UP)
  np.testing.assert_array_equal(
    up[:3, [0, 1, 3]], [[1, 2, 2], [3, 4, 4], [5, 6, 6]]
  )
  # Rows that read the new embed are drawn; so are the columns of a new neuron.
  assert (up[3:] != 0).all()
  assert (up[:, 2] != 0).all()
  down = _slice(growth, np.arange(1.0, 7).reshape(2, 3), DOWN)
  np.testing.assert_array_equal(
    down,
    [
      [1, 2, 3, 0, 0],
      [2, 2.5, 3, 0, 0],
      [0, 0, 0, 0, 0],  # what reads the new neuron
      [2, 2.5, 3, 0, 0],
    ],
  )
  # Moments have no past there.
  mu = _slice(growth, np.ones((3, 2)), UP, powers=FIRST_MOMENT)
  np.testing.assert_array_equal(
    mu, np.vstack([[[1, 0.5, 0, 0.5]] * 3, [[0, 0, 0, 0]] * 2])
  )


def test_drawn_entries_have_the_size_of_the_source():
  growth = _growth({"embed": axis_map.padded(50, 250, silent=Role.WRITES)})
  own = 3 * np.random.default_rng(0).standard_normal((50, 40))
  grown = _slice(growth, own, LeafAxes((reads("embed"), writes("vocab"))))
  drawn = grown[50:]
  # The standard deviation of one from 8,000 draws is off by 1 %.
  assert math.isclose(drawn.std(), own.std(), rel_tol=0.05)
  assert abs(drawn.mean()) < 0.15


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("block", [16, 2**18])
def test_noise_sums_to_zero_over_copies_of_several_axes(
  silent, block, monkeypatch
):
  monkeypatch.setattr(matrix, "_BLOCK_ELEMENTS", block)
  layers = depth.LayerMap(
    copies=depth.interpolate(1, 2).copies,
    silent=np.array([False, True]),
    silent_noise=0.7,
  )
  growth = Growth(width=WIDTH, layers=layers, noise=0.5)
  own = np.random.default_rng(2).standard_normal((2, 3, 2, 5))
  grown = _slice(growth, own, LEAVES["out"], silent=silent)
  plain = _slice(_growth(WIDTH), own, LEAVES["out"])
  noise = grown if silent else grown - plain
  sums = np.zeros(own.shape[:3] + (8,))
  heads = [WIDTH["kv_head"].source, WIDTH["q_per_kv"].source]
  for i, j in itertools.product(range(5), range(4)):
    sums[heads[0][i], heads[1][j]] += noise[i, j]
  np.testing.assert_allclose(sums, 0, atol=1e-14)
  # Every head has at least two copies here.
  assert (noise != 0).all()
  shares = np.sqrt(np.mean(plain**2))
  asked = shares * (0.7 if silent else 0.5)
  assert math.isclose(np.sqrt(np.mean(noise**2)), asked, rel_tol=0.15)
