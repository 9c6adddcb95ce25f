"""Gates and choices of the router, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.layers.moe import router

# exp: 1, 8, 4, 2 of 15; and 1, 1, 1, 1 of 4: a tie.
LOGITS = jnp.log(jnp.asarray([[1.0, 8.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))


def _choose(*, valid=(True, True), **fields):
  config = MoeConfig(num_experts=4, **fields)
  return router.choose(LOGITS, valid=jnp.asarray(valid), config=config)


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
  ],
)
def test_gates(fields, gates):
  routing = _choose(**fields)
  np.testing.assert_allclose(routing.gates[0], gates, rtol=1e-6)
  assert routing.experts[0].tolist() == [1, 2][: len(gates)]


def test_lowest_expert_wins_a_tie():
  assert _choose(top_k=3).experts[1].tolist() == [0, 1, 2]


def test_padding_has_no_gates():
  routing = _choose(valid=(False, True))
  np.testing.assert_array_equal(routing.gates[0], [0, 0])
  np.testing.assert_allclose(jnp.sum(routing.gates[1]), 1, rtol=1e-6)
