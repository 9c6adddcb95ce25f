"""Cosines against plain sums over the entries of kernels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.evaluation.routing.cosines import Family, Origin, cosines
from aquila_jax.models import decoder_lm
from tests.evaluation.routing import tiny_moe

KERNELS = ("gate_kernel", "up_kernel", "down_kernel")
# Sums of at most 12 * 8 float32 products: some 100 roundings of 6e-8.
ROUNDING = 1e-5


class Arrays:
  """Random parameters by name; says which slices were read."""

  def __init__(self, config: ModelConfig, seed: int):
    generator = np.random.default_rng(seed)
    self.leaves = {}
    for part, tree in decoder_lm.abstract_params(config)["layers"].items():
      if part in ("mlp", "dense_mlp"):
        for name in KERNELS:
          drawn = generator.standard_normal(tree[name].shape)
          self.leaves[f"layers.{part}.{name}"] = drawn.astype(np.float32)
    self.read_slices = []

  def read(self, name: str, *, index: tuple = ()) -> np.ndarray:
    self.read_slices.append((name.rpartition(".")[2], index))
    return self.leaves[name][index]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
  pairs = [(float(x), float(y)) for x, y in zip(a.flat, b.flat, strict=True)]
  products = sum(x * y for x, y in pairs)
  squares = sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs)
  return products / math.sqrt(squares)


def _expected(mixture: Arrays, row: int, a: int, b: int) -> float:
  return sum(
    _cosine(leaf[row, a], leaf[row, b])
    for leaf in (mixture.leaves[f"layers.mlp.{name}"] for name in KERNELS)
  ) / len(KERNELS)


def test_experts_are_compared_layer_by_layer():
  mixture = Arrays(tiny_moe.CONFIG, 0)
  said = []
  found = cosines(tiny_moe.CONFIG, mixture, say=said.append)
  assert [one.layer for one in found] == [0, 1]
  for row, one in enumerate(found):
    for a in range(4):
      for b in range(4):
        expected = _expected(mixture, row, a, b)
        assert one.between[a, b] == pytest.approx(expected, abs=ROUNDING)
    assert len(one.pairs()) == 6 and one.to_parent is None
    assert one.pairs()[0] == one.between[0, 1]
  assert said[-1] == "comparing the experts of layer 1"
  # One kernel of one layer at a time.
  assert {index for _, index in mixture.read_slices} == {(0,), (1,)}
  assert len(mixture.read_slices) == 6


def test_a_factor_and_a_zero_kernel():
  mixture = Arrays(tiny_moe.CONFIG, 0)
  for name, leaf in mixture.leaves.items():
    leaf[0, 1] = 3 * leaf[0, 0]
    leaf[0, 2] = -leaf[0, 0]
    leaf[0, 3] = 0 if "down" in name else leaf[0, 0]
  between = cosines(tiny_moe.CONFIG, mixture)[0].between
  np.testing.assert_allclose(between[0], [1, 1, -1, 2 / 3], atol=ROUNDING)


def _dense(config: ModelConfig, *, mlp_dim: int) -> ModelConfig:
  return dataclasses.replace(config, moe=None, mlp_dim=mlp_dim)


def test_shards_are_compared_with_their_units_of_a_dense_parent():
  config = tiny_moe.with_moe(3, layers=(0, 2))
  parent = _dense(config, mlp_dim=12)
  mixture, dense = Arrays(config, 0), Arrays(parent, 1)
  # Copies of two shards, of 6 units each; the last is of another model.
  shards = [slice(0, 6), slice(6, 12)]
  origins = [Origin(expert=None, units=shards[e % 2]) for e in range(3)]
  family = Family(config=parent, params=dense, origins=[*origins, None])
  found = cosines(config, mixture, family=family)
  assert [one.layer for one in found] == [0, 2]
  for row, one in enumerate(found):
    assert one.to_parent is not None and one.copies is not None
    for e in range(3):
      expected = 0.0
      for name in KERNELS:
        whole = dense.leaves[f"layers.mlp.{name}"][one.layer]
        part = (
          whole[shards[e % 2]] if "down" in name else whole[:, shards[e % 2]]
        )
        own = mixture.leaves[f"layers.mlp.{name}"][row, e]
        expected += _cosine(own, part) / 3
      assert one.to_parent[e] == pytest.approx(expected, abs=ROUNDING)
    assert np.isnan(one.to_parent[3])
    np.testing.assert_array_equal(
      one.copies,
      [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]],
    )
    assert one.pairs(of_copies=True).tolist() == [one.between[0, 2]]


def test_experts_are_compared_with_those_of_a_smaller_mixture():
  small = tiny_moe.with_moe(num_experts=2)
  mixture, parent = Arrays(tiny_moe.CONFIG, 0), Arrays(small, 1)
  origins = [Origin(expert=e // 2, units=slice(0, 6)) for e in range(4)]
  family = Family(config=small, params=parent, origins=origins)
  for row, one in enumerate(cosines(tiny_moe.CONFIG, mixture, family=family)):
    assert one.to_parent is not None
    for e in range(4):
      expected = sum(
        _cosine(
          mixture.leaves[f"layers.mlp.{name}"][row, e],
          parent.leaves[f"layers.mlp.{name}"][row, e // 2],
        )
        for name in KERNELS
      )
      assert one.to_parent[e] == pytest.approx(expected / 3, abs=ROUNDING)
    assert len(one.pairs(of_copies=True)) == 2
