"""Sums over a K of which a core holds but a part, interpreted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn.tpu_passes import deep
from aquila_jax.kernels.expert_ffn.tpu_tiles import Chip, Deep
from aquila_jax.kernels.expert_ffn.tpu_visits import Visits

_DEPTH, _WIDTH, _ROWS = 384, 160, 32


def _chip(kind="TPU v6 lite", **fields) -> Chip:
  sizes = dict(rows=256, outer_rows=512, deep_rows=1024, interpret=True)
  return Chip.of(kind, **sizes | fields)


@functools.partial(jax.jit, static_argnames=("axis", "tile"))
def _run(xs, kernels, group_rows, *, axis, tile):
  visits = Visits.of_rows(
    group_rows,
    num_rows=xs[0].shape[0],
    tile_rows=tile.rows,
    empty_experts=False,
  )
  return deep(
    xs,
    [(kernel, axis) for kernel in kernels],
    visits=visits,
    tile=tile,
    chip=_chip(),
    name="sums",
  )


@pytest.mark.parametrize("depth", [128, 384])
@pytest.mark.parametrize(("rows", "part_rows"), [(8, 8), (16, 4), (32, 16)])
@pytest.mark.parametrize("columns", [_WIDTH, 128])  # the latter are cut
@pytest.mark.parametrize(("axis", "num_products"), [(2, 1), (1, 2)])
def test_sums_are_those_of_each_expert(
  depth, rows, part_rows, columns, axis, num_products
):
  """Tiles with one expert, three, part of one, and behind them all."""
  loads = np.asarray([9, 0, 2, 1, 13])
  rng = np.random.default_rng(0)
  xs = [rng.normal(size=(_ROWS, _DEPTH)) for _ in range(num_products)]
  kernels = [
    rng.normal(size=(len(loads), _DEPTH, _WIDTH)) for _ in range(num_products)
  ]
  used, expert = loads.sum(), np.repeat(np.arange(len(loads)), loads)
  expected = np.zeros((_ROWS, _WIDTH))
  for x, kernel in zip(xs, kernels, strict=True):
    expected[:used] += np.einsum("RK,RKN->RN", x[:used], kernel[expert])
    x[used:] = np.nan
  if axis == 1:
    kernels = [kernel.swapaxes(1, 2) for kernel in kernels]
  as_float32 = functools.partial(jax.tree.map, lambda a: a.astype(np.float32))
  found = _run(
    as_float32(xs),
    as_float32(kernels),
    jnp.asarray(loads, jnp.int32),
    axis=axis,
    tile=Deep(
      rows=rows, part_rows=part_rows, depth=depth, columns=columns, moved=0
    ),
  )
  # Up to 768 products of numbers near 1, in a sum of size 28.
  np.testing.assert_allclose(found, expected, atol=768 * 2**-24 * 28)


def test_without_rows_all_are_zeros():
  nan = jnp.full((_ROWS, _DEPTH), jnp.nan)
  found = _run(
    [nan],
    [jnp.ones((2, _DEPTH, _WIDTH))],
    jnp.zeros(2, jnp.int32),
    axis=2,
    tile=Deep(rows=16, part_rows=4, depth=128, columns=_WIDTH, moved=0),
  )
  np.testing.assert_array_equal(found, 0)


def _tile(chip: Chip, **fields) -> Deep | None:
  # Of AquilaMoE's experts: two products of their gradients.
  sizes = dict(num_rows=32768, depth=20480, width=5120, num_experts=4)
  return Deep.of(**sizes | dict(num_products=2, itemsize=2) | fields, chip=chip)


def test_tiles_fill_what_a_matrix_unit_holds_and_fit():
  # v6e has 128 MiB, and a product of 256 by 256: 640 columns of 40 lanes would
  # be three of them, not two and a half.
  tile = _tile(_chip())
  assert tile is not None
  assert (tile.depth, tile.columns) == (512, 5120)
  # Rows once, kernels once for each of 32 tiles and once more an expert.
  kernels = 2 * 20480 * 5120
  assert tile.moved == 2 * 32768 * 20480 + 36 * kernels + 32768 * 5120
  # v5p has 64 MiB and two cores, which share columns and read all rows.
  tile = _tile(_chip("TPU v5"))
  assert tile is not None
  assert (tile.depth, tile.columns) == (640, 2560)
  assert tile.moved == 4 * 32768 * 20480 + 36 * kernels + 32768 * 5120


@pytest.mark.parametrize(
  ("kind", "fields"),
  [
    ("TPU v6 lite", dict(depth=20500)),  # in no parts of whole lanes
    ("TPU v5", dict(width=100)),  # which two cores cannot share
    ("TPU v3", dict(itemsize=400)),
  ],
)
def test_there_may_be_none(kind, fields):
  assert _tile(_chip(kind), **fields) is None
