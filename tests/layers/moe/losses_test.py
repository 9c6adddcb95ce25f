"""Balance, z-loss, load, entropy and drops, by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.layers.moe.losses import routing_stats, summed
from aquila_jax.layers.moe.router import Affinity

# Two experts, probabilities (3/4, 1/4), (1/4, 3/4), (1/2, 1/2) and padding;
# logsumexp of each row: log 4, log 4, log 2. Two rows of two tokens.
LOGITS = jnp.log(jnp.asarray([[3.0, 1.0], [1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]))
EXPERTS = jnp.asarray([[0], [1], [0], [0]])
VALID = jnp.asarray([True, True, True, False])


@functools.partial(jax.jit, static_argnames="num_rows")
def _stats(logits=LOGITS, *, experts=EXPERTS, valid=VALID, num_rows=2):
  every = jnp.arange(logits.shape[1])
  assigned = jnp.any(experts[:, :, None] == every[None, None], axis=1)
  sums = summed(
    Affinity(plain=logits, logits=logits, bias=None, valid=valid),
    jax.nn.softmax(logits, axis=-1),
    assigned=assigned & valid[:, None],
    num_rows=num_rows,
  )
  return routing_stats(
    sums,
    valid=valid,
    top_gate=jnp.asarray([0.75, 0.5, 0.25, 7.0]),
    dropped=jnp.asarray(1.0),  # of three
  )


def test_values_by_hand():
  stats = _stats()
  # f = (2/3, 1/3); P = (1/2, 1/2); E sum f P = 2 (1/3 + 1/6) = 1.
  np.testing.assert_allclose(stats.balance_loss, 1.0, rtol=1e-6)
  np.testing.assert_allclose(stats.load, [2 / 3, 1 / 3], rtol=1e-6)
  np.testing.assert_allclose(stats.probability, [1 / 2, 1 / 2], rtol=1e-6)
  # With f = (1, 0): 2 * 1/2.
  np.testing.assert_allclose(stats.balance(jnp.array([1.0, 0.0])), 1.0)
  z = (2 * np.log(4) ** 2 + np.log(2) ** 2) / 3
  np.testing.assert_allclose(stats.z_loss, z, rtol=1e-6)
  quarter = np.log(4) / 4 + 3 / 4 * np.log(4 / 3)
  entropy = (2 * quarter + np.log(2)) / 3
  np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-6)
  np.testing.assert_allclose(stats.top_gate, 0.5, rtol=1e-6)
  np.testing.assert_allclose(stats.dropped, 1 / 3, rtol=1e-6)


def test_the_balance_of_sequences_is_that_of_each_row():
  # Rows of 3 and 1: tokens 0, 1, 2 have f = (2/3, 1/3) and P = (1/2, 1/2);
  # padding counts for nothing.
  np.testing.assert_allclose(
    _stats(num_rows=1).sequence_balance, 1.0, rtol=1e-6
  )
  # Rows of 2 tokens and 1: 2 (1/2 1/2 + 1/2 1/2) = 1 with weight 2/3, and
  # 2 (1 * 1/2) = 1 with weight 1/3.
  np.testing.assert_allclose(_stats().sequence_balance, 1.0, rtol=1e-6)
  # Four rows of one: 2 * 3/4, 2 * 3/4, 2 * 1/2, nothing; mean of three.
  np.testing.assert_allclose(
    _stats(num_rows=4).sequence_balance, 4 / 3, rtol=1e-6
  )


def test_padding_does_not_count():
  moved = LOGITS.at[3].set(jnp.asarray([-5.0, 5.0]))
  found = _stats(moved, experts=EXPERTS.at[3].set(1))
  jax.tree.map(np.testing.assert_array_equal, found, _stats())


def test_balance_is_e_when_one_expert_gets_everything():
  logits = jnp.asarray([[90.0, 0.0, 0.0]] * 4)
  stats = _stats(
    logits, experts=jnp.zeros((4, 1), jnp.int32), valid=jnp.ones(4, bool)
  )
  np.testing.assert_allclose(stats.balance_loss, 3.0, rtol=1e-6)
  np.testing.assert_allclose(stats.entropy, 0.0, atol=1e-6)


def test_gradient_of_the_balance_runs_through_the_probabilities_only():
  grad = jax.jit(jax.grad(lambda logits: _stats(logits).balance_loss))(LOGITS)
  # d/dlogits of E sum_i f_i mean_m p_mi with f = (2/3, 1/3) held fast:
  # E / 3 * p_i (f_i - sum_j f_j p_j) for each of the three valid tokens.
  f = np.array([2 / 3, 1 / 3])
  p = np.array([[3 / 4, 1 / 4], [1 / 4, 3 / 4], [1 / 2, 1 / 2]])
  expected = np.zeros((4, 2))
  expected[:3] = 2 / 3 * p * (f - (p @ f)[:, None])
  np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_what_is_only_reported_has_no_gradient():
  def reported(logits):
    stats = _stats(logits)
    return stats.entropy + stats.top_gate + jnp.sum(stats.load)

  np.testing.assert_array_equal(jax.jit(jax.grad(reported))(LOGITS), 0)


def test_batch_of_padding_only_is_finite():
  stats = _stats(valid=jnp.zeros(4, bool))
  rest = stats.replace(dropped=jnp.zeros(()))
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), rest)
