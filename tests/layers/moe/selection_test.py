"""Gates and choices of tokens, by hand and against a loop."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.layers.moe import selection
from aquila_jax.layers.moe.router import Affinity

# exp: 1, 8, 4, 2 of 15; and 1, 1, 1, 1 of 4: a tie.
LOGITS = np.log([[1.0, 8.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]])


def _choose(logits: Any = LOGITS, *, valid=None, bias=None, **fields: Any):
  values = jnp.asarray(logits, jnp.float32)
  num_tokens, num_experts = values.shape
  affinity = Affinity(
    plain=values,
    logits=values,
    bias=None if bias is None else jnp.asarray(bias, jnp.float32),
    valid=jnp.asarray([True] * num_tokens if valid is None else valid),
  )
  config = MoeConfig(num_experts=num_experts, **fields)
  return _compiled(affinity, config)


_compiled = jax.jit(selection.choose, static_argnums=1)


def _scoring(order: Any):
  return selection.rule(MoeConfig(router_order=order)).scoring


@pytest.mark.parametrize(
  ("fields", "gates"),
  [
    (dict(router_order="topk_then_softmax"), [8 / 12, 4 / 12]),
    (dict(router_order="softmax_then_topk"), [8 / 12, 4 / 12]),
    (
      dict(router_order="softmax_then_topk", renormalise=False),
      [8 / 15, 4 / 15],
    ),
    (dict(router_order="topk_then_softmax", top_k=1), [1.0]),
    (
      dict(router_order="softmax_then_topk", renormalise=False, top_k=1),
      [8 / 15],
    ),
    # sigmoid(log a) = a / (1 + a)
    (dict(router_order="sigmoid", renormalise=False), [8 / 9, 4 / 5]),
    (dict(router_order="sigmoid"), [40 / 76, 36 / 76]),
  ],
)
@pytest.mark.parametrize("gate_scale", [1.0, 2.5])
def test_gates(fields, gates, gate_scale):
  routing = _choose(gate_scale=gate_scale, **fields)
  expected = gate_scale * np.asarray(gates)
  np.testing.assert_allclose(routing.gates[0], expected, rtol=1e-6)
  assert routing.experts[0].tolist() == [1, 2][: len(gates)]


def test_lowest_expert_wins_a_tie():
  assert _choose(top_k=3).experts[1].tolist() == [0, 1, 2]


def test_padding_has_no_gates():
  routing = _choose(valid=(False, True))
  np.testing.assert_array_equal(routing.gates[0], [0, 0])
  np.testing.assert_allclose(jnp.sum(routing.gates[1]), 1, rtol=1e-6)


@pytest.mark.parametrize(
  ("order", "bias", "gates"),
  [
    # Logits are log 1, 8, 4, 2: expert 0 comes first with 2.1 more than log 8.
    ("topk_then_softmax", [2.2, 0, 0, 0], [1 / 9, 8 / 9]),
    # Scores are 1, 8, 4, 2 of 15; 0.5 lifts expert 0 over the 8.
    ("softmax_then_topk", [0.5, 0, 0, 0], [1 / 9, 8 / 9]),
    # Scores are 1/2, 8/9, 4/5, 2/3.
    ("sigmoid", [0.4, 0, 0, 0], [9 / 25, 16 / 25]),
  ],
)
def test_a_bias_moves_the_choice_and_not_the_gates(order, bias, gates):
  routing = _choose(router_order=order, bias=bias)
  assert routing.experts[0].tolist() == [0, 1]
  np.testing.assert_allclose(routing.gates[0], gates, rtol=1e-6)
  none = _choose(router_order=order, bias=[0, 0, 0, 0])
  assert none.experts[0].tolist() == [1, 2]


def test_experts_of_no_score_get_gates_of_zero_and_not_nan():
  logits = [[0.0, 200.0, 0.0, 0.0]]
  routing = _choose(
    logits, router_order="softmax_then_topk", bias=[9, 0, 9, 0], top_k=2
  )
  assert routing.experts[0].tolist() == [0, 2]
  np.testing.assert_array_equal(routing.gates[0], [0, 0])


def _by_groups(scores, *, num_groups, top_groups, top_k, counted):
  """Sorts groups, and then experts, in Python; ties go to the lower."""
  size = len(scores) // num_groups
  groups = [scores[g * size : (g + 1) * size] for g in range(num_groups)]
  value = [sum(sorted(group)[::-1][:counted]) for group in groups]
  best = sorted(range(num_groups), key=lambda g: -value[g])[:top_groups]
  allowed = [e for e in range(len(scores)) if e // size in best]
  return sorted(allowed, key=lambda e: -scores[e])[:top_k]


@pytest.mark.parametrize(
  ("group_score", "order", "with_bias"),
  list(
    itertools.product(
      ["max", "top2_sum"], ["topk_then_softmax", "sigmoid"], [False, True]
    )
  ),
)
def test_the_best_groups_are_those_of_a_loop(group_score, order, with_bias):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(40, 12)).astype(np.float32)
  logits[7] = logits[7, 0]  # a tie of all
  bias = rng.normal(size=12).astype(np.float32) if with_bias else None
  sizes: dict[str, Any] = dict(num_groups=4, top_groups=2, top_k=3)
  routing = _choose(
    logits, bias=bias, router_order=order, group_score=group_score, **sizes
  )
  scores = np.asarray(_scoring(order).scores(jnp.asarray(logits)))
  scores = scores + (0 if bias is None else bias)
  counted = {"max": 1, "top2_sum": 2}[group_score]
  found = routing.experts.tolist()
  for token, row in enumerate(scores):
    assert found[token] == _by_groups(row, counted=counted, **sizes), token
  # The limit is felt.
  free = jax.lax.top_k(jnp.asarray(scores), 3)[1].tolist()
  assert found != free


@pytest.mark.parametrize(
  "order", ["topk_then_softmax", "softmax_then_topk", "sigmoid"]
)
def test_probabilities_sum_to_one(order):
  scoring = _scoring(order)
  found = scoring.probability(jnp.asarray(LOGITS, jnp.float32))
  np.testing.assert_allclose(jnp.sum(found, axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(found[1], 0.25, rtol=1e-6)
