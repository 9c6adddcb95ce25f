from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.experiment_config import LossConfig
from aquila_jax.core.types import RoutingStats
from aquila_jax.layers import target_scores
from aquila_jax.training import losses
from aquila_jax.training.balance import BalanceInputs

_NONE = LossConfig(balance=0.0, router_z=0.0)


@pytest.fixture(scope="module")
def batch(tiny):
  return jax.tree.map(jnp.asarray, tiny.batch(3, rows=4))


@pytest.fixture(scope="module")
def logits():
  return 3 * jax.random.normal(jax.random.key(0), (4, 16, 64))


def _routing(scale=1.0):
  # E sum f P: 2 (1/4 1/2 + 3/4 1/2) = 1 and 2 (1/2 1 + 1/2 1) = 2.
  return RoutingStats(
    load=scale * jnp.array([[0.25, 0.75], [0.5, 0.5]]),
    probability=scale * jnp.array([[0.5, 0.5], [1.0, 1.0]]),
    sequence_balance=scale * jnp.array([1.25, 2.25]),
    z_loss=scale * jnp.array([3.0, 5.0]),
    entropy=scale * jnp.array([0.5, 0.6]),
    top_gate=scale * jnp.array([0.7, 0.8]),
    dropped=scale * jnp.array([0.0, 0.1]),
  )


@functools.partial(jax.jit, static_argnames="config")
def _terms(logits, routing, batch, config):
  return losses.loss_terms(
    target_scores.of_logits(logits, batch.targets),
    routing,
    batch=batch,
    totals=losses.batch_totals(batch),
    config=config,
    num_languages=2,
  )


def _plain(logits, batch):
  """Token by token, in float64."""
  logits, batch = jax.tree.map(np.asarray, (logits, batch))
  nats, z2, max2, weight = 0.0, 0.0, 0.0, 0.0
  by_language = np.zeros((2, 2))
  for (b, t), w in np.ndenumerate(batch.weights):
    row = np.asarray(logits[b, t], np.float64)
    z = np.log(np.sum(np.exp(row)))
    loss = z - row[batch.targets[b, t]]
    nats += w * loss
    z2 += w * z**2
    max2 += w * row.max() ** 2
    weight += w
    by_language[batch.languages[b, t]] += (w * loss, w)
  return nats / weight, z2 / weight, max2 / weight, by_language


def test_terms_match_a_plain_loop(logits, batch):
  terms = _terms(logits, None, batch, _NONE)
  cross_entropy, lm_z, lm_max_z, by_language = _plain(logits, batch)
  # Sums of about 50 float32 values.
  np.testing.assert_allclose(terms.cross_entropy, cross_entropy, rtol=1e-5)
  np.testing.assert_allclose(terms.lm_z, lm_z, rtol=1e-5)
  np.testing.assert_allclose(terms.lm_max_z, lm_max_z, rtol=1e-5)
  np.testing.assert_allclose(terms.language_nats, by_language[:, 0], rtol=1e-5)
  np.testing.assert_allclose(terms.language_weight, by_language[:, 1])
  assert float(terms.total) == float(terms.cross_entropy)
  assert float(terms.weight) == batch.weights.sum()


@pytest.mark.parametrize(
  "field, mean",
  # Means over the two layers of _routing; None: of the logits.
  [("balance", 1.5), ("router_z", 4.0), ("lm_z", None), ("lm_max_z", None)],
)
def test_a_weight_adds_its_term(logits, batch, field, mean):
  config = dataclasses.replace(_NONE, **{field: 0.5})
  terms = _terms(logits, _routing(), batch, config)
  if mean is None:
    mean = getattr(terms, field)
  expected = terms.cross_entropy + 0.5 * mean
  np.testing.assert_allclose(terms.total, expected, rtol=1e-6)


def test_adaptive_weights_take_the_place_of_the_constant(logits, batch):
  config = dataclasses.replace(_NONE, balance=9.0)
  terms = losses.loss_terms(
    target_scores.of_logits(logits, batch.targets),
    _routing(),
    batch=batch,
    totals=losses.batch_totals(batch),
    config=config,
    num_languages=2,
    balance=BalanceInputs(weights=jnp.array([0.5, 0.25])),
  )
  # (0.5 * 1 + 0.25 * 2) / 2
  np.testing.assert_allclose(terms.total, terms.cross_entropy + 0.5, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(terms.balance), [1.0, 2.0], rtol=1e-6)


def test_gradient_of_cross_entropy_is_softmax_minus_one_hot(logits, batch):
  total = jax.jit(jax.grad(lambda x: _terms(x, None, batch, _NONE).total))
  grads = total(logits)
  one_hot = np.eye(64)[np.asarray(batch.targets)]
  softmax = np.asarray(jax.nn.softmax(logits, axis=-1))
  weights = np.asarray(batch.weights / batch.weights.sum())[..., None]
  np.testing.assert_allclose(grads, weights * (softmax - one_hot), atol=1e-7)


def test_microbatches_add_up_to_the_batch(logits, batch):
  config = LossConfig(balance=0.1, router_z=0.1, lm_z=0.1, lm_max_z=0.1)
  whole = _terms(logits, _routing(), batch, config)
  totals = losses.batch_totals(batch)
  scores = target_scores.of_logits(logits, batch.targets)

  def of_rows(tree, i):
    return jax.tree.map(lambda leaf: leaf[i : i + 2], tree)

  parts = [
    losses.loss_terms(
      of_rows(scores, i),
      _routing(),
      batch=of_rows(batch, i),
      totals=totals,
      config=config,
      num_languages=2,
    )
    for i in (0, 2)
  ]
  added = jax.tree.map(jnp.add, *parts)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), added, whole
  )


def test_a_batch_without_targets_has_no_loss(logits, batch):
  empty = batch.replace(weights=jnp.zeros_like(batch.weights))
  terms = _terms(logits, None, empty, _NONE)
  assert float(terms.total) == 0.0
