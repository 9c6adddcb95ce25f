"""Which load the balance loss takes, adaptive weights, the selection bias."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.axes import LeafAxes, writes
from aquila_jax.core.experiment_config import AdaptiveBalance, LossConfig
from aquila_jax.core.types import RoutingStats
from aquila_jax.training import balance
from aquila_jax.training.balance import BalanceInputs, make_rule

# Of three microbatches with 1, 2 and 5 of 8 tokens: 2 layers, 4 experts.
SHARES = np.array([1 / 8, 2 / 8, 5 / 8])


def _draw(seed):
  drawn = np.random.default_rng(seed).random((3, 2, 4))
  return drawn / drawn.sum(axis=-1, keepdims=True)


LOADS, PROBABILITIES = _draw(0), _draw(1)


def _routing(part, *, load=LOADS, probability=PROBABILITIES) -> RoutingStats:
  """A microbatch's, times its share of the tokens."""
  zeros = jnp.zeros(2)
  return RoutingStats(
    load=jnp.asarray(SHARES[part] * load[part], jnp.float32),
    probability=jnp.asarray(SHARES[part] * probability[part], jnp.float32),
    sequence_balance=jnp.asarray(SHARES[part] * np.array([1.5, 2.5])),
    z_loss=zeros,
    entropy=zeros,
    top_gate=zeros,
    dropped=zeros,
  )


def _summed(name) -> np.ndarray:
  """The loss of the batch: the sum over its microbatches, in their order."""
  rule, total = make_rule(name), 0.0
  everything = jnp.asarray(np.einsum("m,mle->le", SHARES, LOADS), jnp.float32)
  so_far = jnp.zeros((2, 4))
  for part in range(3):
    routing = _routing(part)
    inputs = BalanceInputs(total=everything, so_far=so_far)
    total += np.asarray(rule.loss(routing, inputs), np.float64)
    so_far = so_far + routing.load
  return np.asarray(total)


def test_each_rule_is_its_formula():
  whole = np.einsum("m,mle->le", SHARES, LOADS)
  mean = np.einsum("m,mle->le", SHARES, PROBABILITIES)
  so_far = [
    np.einsum("m,mle->le", SHARES[: m + 1], LOADS[: m + 1])
    / SHARES[: m + 1].sum()
    for m in range(3)
  ]

  def parts(loads):
    return sum(
      share * 4 * np.sum(f * p, axis=-1)
      for share, f, p in zip(SHARES, loads, PROBABILITIES, strict=True)
    )

  expected = {
    "global": 4 * np.sum(whole * mean, axis=-1),
    "running": parts(so_far),
    "micro_batch": parts(LOADS),
    "sequence": [1.5, 2.5],
  }
  found = {name: _summed(name) for name in expected}
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6)
  # They are not the same thing.
  assert len({round(float(value[0]), 3) for value in found.values()}) == 4


@pytest.mark.parametrize("name", ["global", "running", "micro_batch"])
def test_a_batch_in_one_piece_is_its_own_load(name):
  found = make_rule(name).loss(_routing(2), BalanceInputs())
  expected = SHARES[2] * 4 * np.sum(LOADS[2] * PROBABILITIES[2], axis=-1)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["global", "running", "micro_batch"])
def test_a_microbatch_of_padding_has_no_balance(name):
  nothing = jax.tree.map(jnp.zeros_like, _routing(0))
  for inputs in (BalanceInputs(), BalanceInputs(so_far=jnp.zeros((2, 4)))):
    np.testing.assert_array_equal(make_rule(name).loss(nothing, inputs), 0)


def test_the_load_has_no_gradient():
  def loss(routing):
    return jnp.sum(make_rule("running").loss(routing, BalanceInputs()))

  grads = jax.grad(loss)(_routing(1))
  np.testing.assert_array_equal(grads.load, 0)
  np.testing.assert_allclose(grads.probability, 4 * LOADS[1], rtol=1e-6)


def test_adaptive_weights_follow_what_is_dropped(tiny):
  config = AdaptiveBalance(sensitivity=0.2, maximum=0.01, smoothing=0.9)
  model = tiny.moe()
  assert model.moe is not None
  start = LossConfig(balance=0.001, adaptive_balance=config)
  weights = balance.initial_weights(start, model)
  assert weights is not None
  np.testing.assert_array_equal(weights, np.full(2, 0.001, np.float32))
  assert balance.initial_weights(LossConfig(), model) is None
  assert balance.initial_weights(start, tiny.model()) is None

  # Dropless, layer by layer: 0.02 over 1/4, and 3/4 of all.
  loads = np.array([[[0.27, 0.25, 0.24, 0.24], [1.0, 0.0, 0.0, 0.0]]] * 3)
  routing = dataclasses.replace(
    _routing(0),
    load=jnp.asarray(loads[0], jnp.float32),
    dropped=jnp.asarray([0.03, 0.0]),
  )
  found = balance.next_weights(
    jnp.asarray(weights), routing, config=config, model=model
  )
  expected = [0.9 * 0.001 + 0.1 * 0.2 * 0.02, 0.9 * 0.001 + 0.1 * 0.01]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # With a capacity it is what was dropped.
  moe = dataclasses.replace(model.moe, capacity_factor=1.5)
  found = balance.next_weights(
    jnp.asarray(weights),
    routing,
    config=config,
    model=dataclasses.replace(model, moe=moe),
  )
  expected = [0.9 * 0.001 + 0.1 * 0.2 * 0.03, 0.9 * 0.001]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_selection_bias_moves_against_the_load():
  axes = {
    "bias": LeafAxes((writes("expert"),), is_selection_bias=True),
    # As the bias in all but that.
    "other": LeafAxes((writes("expert"),)),
  }
  params = {"bias": jnp.full((2, 4), 0.5), "other": jnp.ones((2, 4))}
  # Thirds that were added up in another order: even, but for a rounding.
  third = np.float32(1) / np.float32(3) * np.float32(0.75)
  load = jnp.asarray([[0.1, 0.4, 0.3, 0.2], [0.25, third, 0.25, 0.25]])
  load = load.at[1, 2].set(np.nextafter(np.float32(0.25), np.float32(1)))
  moved = balance.move_selection_bias(params, axes=axes, load=load, rate=0.01)
  np.testing.assert_allclose(moved["bias"][0], [0.51, 0.49, 0.49, 0.51])
  np.testing.assert_array_equal(moved["bias"][1], 0.5)
  np.testing.assert_array_equal(moved["other"], 1.0)
