from __future__ import annotations

import numpy as np
import pytest

from aquila_jax.evaluation.routing import measures
from tests.evaluation.routing import tiny_moe


def _layer(**options):
  # Domain 0: tokens 0, 0, 1 at experts 0, 0, 1; domain 1: token 1 at 1.
  counts = tiny_moe.counted(
    [0, 0, 1, 1], [[0], [0], [1], [1]], domains=[0, 0, 0, 1], **options
  )
  class_of = {0: "Latin", 1: "digits"}
  classes = measures.classes_of(counts, class_of)
  (layer,) = measures.layers_of(
    counts, classes=[one.name for one in classes], class_of=class_of
  )
  return classes, layer


def test_load_by_domain_and_class():
  classes, layer = _layer()
  assert layer.layer == 1
  assert [(c.name, c.tokens, c.distinct, c.examples) for c in classes] == [
    ("Latin", 2, 1, (0,)),
    ("digits", 2, 1, (1,)),
  ]
  np.testing.assert_allclose(layer.load, [0.5, 0.5, 0])
  np.testing.assert_allclose(layer.domain_load, [[2 / 3, 1 / 3, 0], [0, 1, 0]])
  np.testing.assert_allclose(layer.class_load, [[1, 0, 0], [0, 1, 0]])
  assert layer.max_over_mean == pytest.approx(1.5)
  assert layer.load_entropy == pytest.approx(np.log(2))
  assert (layer.router_entropy, layer.top_gate) == (0.5, 0.75)
  assert (layer.router_z, layer.dropped, layer.over_capacity) == (2, 0, None)


def test_dead_experts_are_those_below_the_fraction():
  _, layer = _layer()
  assert layer.dead(0.01) == [2]
  assert layer.dead(0.0) == []
  assert layer.dead(1.6) == [0, 1, 2]


def test_total_variation_is_what_has_to_move():
  a, b = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
  assert measures.distance(a, b) == 0.5
  assert measures.distance(a, a) == 0
  assert measures.distance(np.eye(2)[0], np.eye(2)[1]) == 1


def test_distance_by_chance_is_that_of_samples_of_one_load():
  load = np.array([0.5, 0.3, 0.15, 0.05])
  generator = np.random.default_rng(0)
  drawn = [
    measures.distance(
      generator.multinomial(400, load) / 400,
      generator.multinomial(900, load) / 900,
    )
    for _ in range(2000)
  ]
  expected = measures.chance_distance(load, (400, 900))
  # 2,000 draws of a deviation of about half their mean: 1.1%, three of them.
  assert np.mean(drawn) == pytest.approx(expected, rel=0.034)
  assert measures.chance_distance(load, (0, 5)) == 0


def test_pairs_that_loads_explain_have_a_lift_of_one():
  # Each of 6 pairs of 4 experts 5 times: an expert is met by 15 tokens.
  even = np.full((4, 4), 5) + np.diag([10] * 4)
  lift = measures.pair_lift(even)
  assert np.isnan(np.diag(lift)).all()
  np.testing.assert_allclose(lift[~np.eye(4, dtype=bool)], 1)


def test_pairs_that_are_met_together_have_a_high_lift():
  # 0 and 1 together 10 times, 2 and 3 likewise: loads of 10 explain 20 / 6.
  together = np.kron(np.eye(2, dtype=np.int64), np.full((2, 2), 10))
  lift = measures.pair_lift(together)
  assert lift[0, 1] == lift[3, 2] == pytest.approx(3)
  assert lift[0, 2] == lift[1, 3] == 0


def test_pairs_with_an_expert_that_nobody_meets_are_unknown():
  lift = measures.pair_lift(np.array([[3, 3, 0], [3, 3, 0], [0, 0, 0]]))
  assert lift[0, 1] == pytest.approx(1) and np.isnan(lift[2]).all()
  assert np.isnan(measures.pair_lift(np.zeros((2, 2), np.int64))).all()
