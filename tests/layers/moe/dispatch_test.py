"""Every assignment has its own slot in a block of its expert, or is dropped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.layers.moe import dispatch
from aquila_jax.layers.moe.selection import Routing


def _routing(num_tokens=13, num_experts=5, top_k=2, *, seed=0, busy=None):
  """Random choices; `busy` sends every token to that expert first."""
  rng = np.random.default_rng(seed)
  experts = np.stack(
    [rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)]
  )
  if busy is not None:
    experts[:, 0] = busy
    experts[:, 1:] = (busy + 1 + np.arange(top_k - 1)) % num_experts
  valid = np.arange(num_tokens) % 4 != 3
  counts = np.zeros(num_experts, np.int32)
  positions = np.full(experts.shape, -1, np.int32)
  for token in np.flatnonzero(valid):
    positions[token] = counts[experts[token]]
    counts[experts[token]] += 1
  return Routing(
    experts=jnp.asarray(experts, jnp.int32),
    gates=jnp.asarray(rng.normal(size=(num_tokens, top_k)), jnp.float32),
    valid=jnp.asarray(valid),
    positions=jnp.asarray(positions),
    counts=jnp.asarray(counts),
  )


CASES = [
  dict(),
  dict(seed=1, num_tokens=1),
  dict(seed=2, num_experts=2),
  dict(busy=3),
  dict(seed=3, top_k=4),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_dropless_places_every_valid_assignment_once(case, block_size):
  routing = _routing(**case)
  plan = jax.jit(dispatch.Dropless(block_size).place)(routing)
  slots = np.asarray(plan.slot).reshape(routing.experts.shape)
  num_slots = plan.assignment.size
  assert num_slots == plan.block_expert.size * block_size
  taken = set()
  for token in range(slots.shape[0]):
    for choice in range(slots.shape[1]):
      slot = slots[token, choice]
      if not routing.valid[token]:
        assert slot == num_slots
        assert not plan.kept[token, choice]
        continue
      assert plan.kept[token, choice]
      assert slot not in taken
      taken.add(slot)
      block = slot // block_size
      assert block < plan.num_blocks
      assert plan.block_expert[block] == routing.experts[token, choice]
      assert plan.assignment[slot] == token * slots.shape[1] + choice
  empty = set(range(num_slots)) - taken
  assert all(plan.assignment[slot] == slots.size for slot in empty)
  # No block more than the groups need.
  counts = np.bincount(
    np.asarray(routing.experts)[np.asarray(routing.valid)].ravel(),
    minlength=routing.counts.size,
  )
  assert plan.num_blocks == sum(-(-count // block_size) for count in counts)


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_capacity_keeps_the_first_of_every_expert(case, factor):
  routing = _routing(**case)
  plan = jax.jit(dispatch.Capacity(factor).place)(routing)
  num_tokens, top_k = routing.experts.shape
  num_experts = routing.counts.size
  capacity = int(np.ceil(factor * num_tokens * top_k / num_experts))
  used = [0] * num_experts
  for token in range(num_tokens):
    for choice in range(top_k):
      if not routing.valid[token]:
        assert not plan.kept[token, choice]
        continue
      expert = int(routing.experts[token, choice])
      fits = used[expert] < capacity
      assert plan.kept[token, choice] == fits
      if fits:
        slot = plan.slot[token * top_k + choice]
        assert slot == expert * capacity + used[expert]
      used[expert] += 1


@pytest.mark.parametrize(
  "placement", [dispatch.Dropless(4), dispatch.Capacity(0.6)]
)
def test_rows_go_out_and_come_back_with_their_gates(placement):
  routing = _routing()
  rng = np.random.default_rng(5)
  x = jnp.asarray(rng.normal(size=(13, 3)), jnp.float32)
  upstream = jnp.asarray(rng.normal(size=(13, 3)), jnp.float32)

  def through(x, gates):
    plan = placement.place(routing.replace(gates=gates))
    return plan.combine(plan.gather(x))

  # Experts that do nothing: a token's row times the sum of its kept gates.
  kept = np.asarray(jax.jit(placement.place)(routing).kept)
  share = jnp.sum(jnp.where(kept, routing.gates, 0.0), axis=1, keepdims=True)
  out = jax.jit(through)(x, routing.gates)
  np.testing.assert_allclose(out, x * share, atol=1e-6)
  gradient = jax.grad(
    lambda *a: jnp.sum(upstream * through(*a)), argnums=(0, 1)
  )
  x_grad, gate_grad = jax.jit(gradient)(x, routing.gates)
  np.testing.assert_allclose(x_grad, upstream * share, atol=1e-6)
  product = jnp.sum(upstream * x, axis=1, keepdims=True)
  np.testing.assert_allclose(gate_grad, jnp.where(kept, product, 0), atol=1e-6)


@pytest.mark.parametrize(
  "placement", [dispatch.Dropless(4), dispatch.Capacity(0.6)]
)
def test_empty_slots_are_finite_unread_and_without_gradient(placement):
  routing = _routing()
  plan = jax.jit(placement.place)(routing)
  x = jnp.asarray(np.random.default_rng(6).normal(size=(13, 3)), jnp.float32)
  rows = jax.jit(plan.gather)(x)
  empty = np.asarray(plan.assignment) == routing.experts.size
  assert empty.any()
  assert np.isfinite(rows).all()
  flat = np.asarray(rows).reshape(-1, 3)
  owner = np.asarray(plan.assignment)[~empty] // routing.experts.shape[1]
  np.testing.assert_array_equal(flat[~empty], np.asarray(x)[owner])

  ruined = jnp.where(empty.reshape(*rows.shape[:2], 1), jnp.nan, rows)
  combine = jax.jit(plan.combine)
  np.testing.assert_array_equal(combine(ruined), combine(rows))

  def combined(rows, gates):
    combining = plan.replace(routing=routing.replace(gates=gates))
    return jnp.sum(combining.combine(rows))

  def spread(x):  # with NaN for the gradient of empty slots
    return jnp.sum(plan.gather(x) * ruined)

  both = jax.jit(jax.grad(combined, argnums=(0, 1)))
  rows_grad, gates_grad = both(ruined, routing.gates)
  np.testing.assert_array_equal(rows_grad.reshape(-1, 3)[empty], 0)
  assert np.isfinite(rows_grad).all()
  np.testing.assert_array_equal(gates_grad, both(rows, routing.gates)[1])
  assert np.isfinite(jax.jit(jax.grad(spread))(x)).all()


@pytest.mark.parametrize(
  ("factor", "placement"),
  [(None, dispatch.Dropless(16)), (1.25, dispatch.Capacity(1.25))],
)
def test_config_chooses_the_placement(factor, placement):
  config = MoeConfig(capacity_factor=factor, block_size=16)
  assert dispatch.make_placement(config) == placement
