"""Gradients by hand of weighed experts: those of autodiff, without outputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn import pallas_tpu, reference
from aquila_jax.layers.moe import dispatch, weighted_experts
from aquila_jax.layers.moe.selection import Routing

NUM_TOKENS, NUM_EXPERTS = 45, 4
# Hidden units in one tile; in three, the last of which is not full; and those
# of a chip with two cores.
CHIPS = {
  "one tile": ("TPU v6 lite", 72, None),
  "tiles": ("TPU v6 lite", 300, 300_000),
  "cores": ("TPU v5", 72, None),
}


def _routing(top_k: int, *, skewed: bool) -> Routing:
  rng = np.random.default_rng(top_k)
  chances = np.array([8.0, 1.0, 1.0, 0.01]) if skewed else np.ones(4)
  keys = rng.random((NUM_TOKENS, NUM_EXPERTS)) ** (1 / chances)
  experts = np.argsort(-keys, axis=1)[:, :top_k].astype(np.int32)
  valid = rng.random(NUM_TOKENS) > 0.2
  counts = np.zeros(NUM_EXPERTS, np.int32)
  positions = np.zeros_like(experts)
  for token in np.flatnonzero(valid):
    for choice, expert in enumerate(experts[token]):
      positions[token, choice] = counts[expert]
      counts[expert] += 1
  return Routing(
    experts=jnp.asarray(experts),
    gates=jnp.asarray(rng.random(experts.shape), jnp.float32),
    valid=jnp.asarray(valid),
    positions=jnp.asarray(positions),
    counts=jnp.asarray(counts),
  )


def _inputs(hidden: int, *, width: int = 24):
  rng = np.random.default_rng(1)

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

  kernels = (
    normal(NUM_EXPERTS, width, hidden, scale=0.2),
    normal(NUM_EXPERTS, width, hidden, scale=0.2),
    normal(NUM_EXPERTS, hidden, width, scale=0.1),
  )
  return normal(NUM_TOKENS, width), kernels, normal(NUM_TOKENS, width)


def _by_autodiff(x, plan, kernels, *, expert_ffn=reference.expert_ffn):
  out = expert_ffn(
    plan.gather(x),
    kernels,
    block_expert=plan.block_expert,
    num_blocks=plan.num_blocks,
  )
  return plan.combine(out)


def _run(function, x, plan, kernels, upstream):
  def of(x, gates, kernels):
    routed = plan.replace(routing=plan.routing.replace(gates=gates))
    return function(x, routed, kernels)

  out, pull_back = jax.vjp(of, x, plan.routing.gates, kernels)
  return out, pull_back(upstream)


def _compiled(function):
  return jax.jit(functools.partial(_run, function))


def _chip(name: str, kernels):
  kind, _, memory = CHIPS[name]
  chip = pallas_tpu.chip_of(
    jnp.float32, kernels, device_kind=kind, tile_rows=(16, 16), interpret=True
  )
  if memory is None:
    return chip
  return dataclasses.replace(chip, memory=memory)


@pytest.mark.mostly_long(one_in=4)
@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
  ("top_k", "skewed", "placement"),
  [
    (2, False, dispatch.Dropless(8)),
    (1, True, dispatch.Dropless(8)),
    (3, True, dispatch.Capacity(0.6)),
  ],
  ids=["even", "skewed", "capacity"],
)
def test_outputs_and_gradients_are_those_of_autodiff(
  name, top_k, skewed, placement
):
  x, kernels, upstream = _inputs(CHIPS[name][1])
  plan = jax.jit(placement.place)(_routing(top_k, skewed=skewed))
  by_hand = functools.partial(weighted_experts.apply, chip=_chip(name, kernels))
  found = _compiled(by_hand)(x, plan, kernels, upstream)
  expected = _compiled(_by_autodiff)(x, plan, kernels, upstream)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=6e-5, rtol=1e-5),
    found,
    expected,
  )
  # A gate that weighs nothing has the gradient of one that would.
  assert np.abs(expected[1][1]).max() > 1e-2


def test_hidden_units_are_in_tiles_where_the_test_says_so():
  for name, (_, hidden, _) in CHIPS.items():
    x, kernels, upstream = _inputs(hidden)
    plan = dispatch.Dropless(8).place(_routing(2, skewed=False))
    by_hand = functools.partial(
      weighted_experts.apply, chip=_chip(name, kernels)
    )
    run = functools.partial(_run, by_hand)
    text = str(jax.make_jaxpr(run)(x, plan, kernels, upstream))
    # 128 sums of a row for each of three tiles.
    assert (",384]" in text) == (name == "tiles"), name


def test_a_gate_of_zero_has_a_gradient():
  x, kernels, upstream = _inputs(72)
  plan = jax.jit(dispatch.Dropless(8).place)(_routing(2, skewed=False))
  gates = plan.routing.gates.at[:, 0].set(0.0)
  plan = plan.replace(routing=plan.routing.replace(gates=gates))
  by_hand = functools.partial(
    weighted_experts.apply, chip=_chip("one tile", kernels)
  )
  _, (_, found, _) = _compiled(by_hand)(x, plan, kernels, upstream)
  _, (_, expected, _) = _compiled(_by_autodiff)(x, plan, kernels, upstream)
  np.testing.assert_allclose(found, expected, atol=6e-5, rtol=1e-5)
  assert np.abs(found[:, 0]).max() > 1e-2


def test_outputs_are_not_kept_for_the_backward_pass():
  """So that, under remat, nothing would need them again."""
  x, kernels, _ = _inputs(72)
  plan = dispatch.Dropless(8).place(_routing(2, skewed=False))
  shape = plan.assignment.size, x.shape[1]

  def kept(function):
    _, pull_back = jax.vjp(lambda x: function(x, plan, kernels), x)
    return [leaf.shape for leaf in jax.tree.leaves(pull_back)].count(shape)

  by_hand = functools.partial(
    weighted_experts.apply, chip=_chip("cores", kernels)
  )
  interpreted = functools.partial(
    pallas_tpu.expert_ffn, device_kind="TPU v5", interpret=True
  )
  assert kept(by_hand) == 1  # the rows
  assert kept(functools.partial(_by_autodiff, expert_ffn=interpreted)) == 2
