"""Balance, z-loss, load and drops, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.layers.moe.losses import routing_stats
from aquila_jax.layers.moe.router import Routing

# Two experts, probabilities (3/4, 1/4), (1/4, 3/4), (1/2, 1/2) and padding;
# logsumexp of each row: log 4, log 4, log 2.
LOGITS = jnp.log(jnp.asarray([[3.0, 1.0], [1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]))
EXPERTS = jnp.asarray([[0], [1], [0], [0]])
VALID = jnp.asarray([True, True, True, False])


def _stats(logits=LOGITS, kept=(True, False, True, True)):
  routing = Routing(
    logits=logits, experts=EXPERTS, gates=jnp.ones((4, 1)), valid=VALID
  )
  return routing_stats(routing, kept=jnp.asarray(kept)[:, None])


def test_values_by_hand():
  stats = _stats()
  # f = (2/3, 1/3); P = (1/2, 1/2); E sum f P = 2 (1/3 + 1/6) = 1.
  np.testing.assert_allclose(stats.balance_loss, 1.0, rtol=1e-6)
  z = (2 * np.log(4) ** 2 + np.log(2) ** 2) / 3
  np.testing.assert_allclose(stats.z_loss, z, rtol=1e-6)
  np.testing.assert_allclose(stats.load, [2 / 3, 1 / 3], rtol=1e-6)
  np.testing.assert_allclose(stats.dropped, 1 / 3, rtol=1e-6)


def test_padding_does_not_count():
  moved = LOGITS.at[3].set(jnp.asarray([-5.0, 5.0]))
  found = _stats(moved, kept=(True, False, True, False))
  jax.tree.map(np.testing.assert_array_equal, found, _stats())


def test_balance_is_the_number_of_experts_when_one_gets_everything():
  routing = Routing(
    logits=jnp.asarray([[50.0, 0.0, 0.0]] * 4),
    experts=jnp.zeros((4, 1), jnp.int32),
    gates=jnp.ones((4, 1)),
    valid=jnp.ones(4, bool),
  )
  stats = routing_stats(routing, kept=jnp.ones((4, 1), bool))
  np.testing.assert_allclose(stats.balance_loss, 3.0, rtol=1e-6)


def test_gradient_of_the_balance_runs_through_the_probabilities_only():
  grad = jax.grad(lambda logits: _stats(logits).balance_loss)(LOGITS)
  # d/dlogits of E sum_i f_i mean_m p_mi with f = (2/3, 1/3) held fast:
  # E / 3 * p_i (f_i - sum_j f_j p_j) for each of the three valid tokens.
  f = np.array([2 / 3, 1 / 3])
  p = np.array([[3 / 4, 1 / 4], [1 / 4, 3 / 4], [1 / 2, 1 / 2]])
  expected = np.zeros((4, 2))
  expected[:3] = 2 / 3 * p * (f - (p @ f)[:, None])
  np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_batch_of_padding_only_is_finite():
  routing = Routing(
    logits=LOGITS,
    experts=EXPERTS,
    gates=jnp.zeros((4, 1)),
    valid=jnp.zeros(4, bool),
  )
  stats = routing_stats(routing, kept=jnp.zeros((4, 1), bool))
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), stats)
