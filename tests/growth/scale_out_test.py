"""Sparse upcycling: when it is exact, and what becomes of every leaf."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import (
  GrowthMask,
  LinearRopeScaling,
  ModelConfig,
  MoeConfig,
)
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from tests.growth import tiny

# float64: 2^-52 times the sums of a forward pass.
EXACT = 1e-13
OPTIONS = ScaleOut(source="dense")


def _moe(**fields) -> MoeConfig:
  defaults: dict[str, Any] = dict(
    num_experts=4, top_k=2, block_size=4, router_init_std=0.5
  )
  return MoeConfig(**(defaults | fields))


def _mixture(moe: MoeConfig, **fields) -> ModelConfig:
  return tiny.replace(tiny.SOURCE, moe=moe, **fields)


def _difference(moe: MoeConfig) -> float:
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = _mixture(moe)
  grown = scale_out(source, target, OPTIONS)
  before = tiny.logits(tiny.SOURCE, source.params)
  after = tiny.logits(target, grown.params)
  return float(np.abs(after - before).max() / np.abs(before).max())


@pytest.mark.parametrize("order", ["topk_then_softmax", "softmax_then_topk"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_exact_where_gates_sum_to_one(order, top_k):
  moe = _moe(router_order=order, top_k=top_k, renormalise=True)
  assert _difference(moe) < EXACT


def test_exact_with_capacity_for_everybody():
  # 12 tokens, 24 assignments: 24 slots for each of the 4 experts.
  assert _difference(_moe(capacity_factor=4.0)) < EXACT


def test_not_exact_where_tokens_are_dropped():
  moe = _moe(capacity_factor=0.5)
  assert _difference(moe) > 1e-2
  plan = plan_scale_out(tiny.SOURCE, _mixture(moe), OPTIONS)
  assert plan.exactness.reasons == (
    "capacity_factor=0.5: what does not fit into an expert is dropped",
  )


def test_gates_that_do_not_sum_to_one_need_text():
  source = tiny.stored(tiny.SOURCE, moments=None)
  moe = _moe(router_order="softmax_then_topk", renormalise=False)
  with pytest.raises(errors.UserError) as caught:
    scale_out(source, _mixture(moe), OPTIONS)
  assert str(caught.value) == (
    "config.model.moe.renormalise=False: it is measured on text, and none is"
    " given"
  )


def test_experts_are_copies_and_all_else_is_the_source():
  source = tiny.stored(tiny.SOURCE, moments=None)
  grown = tiny.arrays(scale_out(source, _mixture(_moe()), OPTIONS).params)
  params = tiny.arrays(source.params)
  router = grown.pop("layers/mlp/router/kernel")
  assert grown.keys() == params.keys()
  for name, leaf in params.items():
    if name.startswith("layers/mlp/"):
      leaf = np.repeat(leaf[:, None], 4, axis=1)  # [L, E, ...]
    assert np.array_equal(grown[name], leaf), name
  assert router.shape == (3, 8, 4)


def test_the_router_has_the_given_deviation_and_the_seed():
  source = tiny.stored(tiny.SOURCE, moments=None)

  def router(std: float, seed: int) -> np.ndarray:
    target = _mixture(_moe(num_experts=64, router_init_std=std))
    grown = scale_out(source, target, OPTIONS, seed=seed)
    return tiny.arrays(grown.params)["layers/mlp/router/kernel"]

  drawn = router(0.02, 0)
  # 1,536 draws: the deviation is known to 1 / sqrt(2 * 1536), here 4 sigma.
  assert abs(drawn.std() / 0.02 - 1) < 4 / np.sqrt(2 * drawn.size)
  assert abs(drawn.mean()) < 4 * 0.02 / np.sqrt(drawn.size)
  assert np.array_equal(drawn, router(0.02, 0))
  assert not np.array_equal(drawn, router(0.02, 1))


def test_gradients_of_the_copies_sum_to_the_dense_gradient():
  source = tiny.stored(tiny.SOURCE)
  target = _mixture(_moe())
  grown = scale_out(source, target, OPTIONS)
  dense = tiny.arrays(tiny.gradients(tiny.SOURCE, source.params))
  sparse = tiny.arrays(tiny.gradients(target, grown.params))
  assert grown.moments is not None
  mu, nu = tiny.arrays(grown.moments.mu), tiny.arrays(grown.moments.nu)
  for name, leaf in dense.items():
    if not name.startswith("layers/mlp/"):
      np.testing.assert_allclose(sparse[name], leaf, rtol=0, atol=1e-13)
      assert np.array_equal(mu[name], leaf)
      assert np.array_equal(nu[name], leaf**2)
      continue
    np.testing.assert_allclose(sparse[name].sum(1), leaf, rtol=0, atol=1e-13)
    # So do the first moments; the second are the square over A E = 8.
    np.testing.assert_allclose(mu[name].sum(1), leaf, rtol=1e-13)
    assert np.array_equal(mu[name][:, 0], mu[name][:, 3])
    np.testing.assert_allclose(nu[name][:, 1], leaf**2 / 8, rtol=1e-13)


def test_second_moments_are_those_of_noisy_tokens():
  """The rule of `_moments` by simulation: M tokens, random experts."""
  rng = np.random.default_rng(0)
  num_tokens, num_experts, top_k, trials = 256, 8, 2, 4000
  squares = {"dense": 0.0, "expert": 0.0}
  for _ in range(trials):
    gradients = rng.standard_normal(num_tokens)
    order = rng.random((num_tokens, num_experts)).argsort(axis=1)
    chosen = (order[:, :top_k] == 0).any(1)  # tokens of expert 0
    squares["dense"] += gradients.sum() ** 2
    squares["expert"] += (gradients[chosen].sum() / top_k) ** 2
  ratio = squares["expert"] / squares["dense"]
  # Each sum of squares is known to sqrt(2 / trials), 2.2%; here 4 sigma.
  assert abs(ratio * num_experts * top_k - 1) < 4 * 2 * np.sqrt(1 / trials)


def test_the_router_starts_without_moments():
  source = tiny.stored(tiny.SOURCE)
  grown = scale_out(source, _mixture(_moe()), OPTIONS)
  assert grown.moments is not None
  for tree in (grown.moments.mu, grown.moments.nu):
    assert not tiny.arrays(tree)["layers/mlp/router/kernel"].any()
  assert int(grown.moments.count) == 7


def test_a_selection_bias_starts_at_zero():
  source = tiny.stored(tiny.SOURCE)
  grown = scale_out(source, _mixture(_moe(selection_bias=True)), OPTIONS)
  assert grown.moments is not None
  for tree in (grown.params, grown.moments.mu, grown.moments.nu):
    bias = tiny.arrays(tree)["layers/mlp/router/selection_bias"]
    assert bias.shape == (3, 4) and not bias.any()
  assert tiny.arrays(grown.params)["layers/mlp/router/kernel"].any()


def test_reset_leaves_the_moments_out():
  source = tiny.stored(tiny.SOURCE)
  options = dataclasses.replace(OPTIONS, optimizer="reset")
  assert scale_out(source, _mixture(_moe()), options).moments is None


def test_the_average_is_upcycled_too():
  source = tiny.stored(tiny.SOURCE, moments=None)
  source = dataclasses.replace(source, ema=tiny.params(tiny.SOURCE, seed=9))
  grown = scale_out(source, _mixture(_moe()), OPTIONS)
  other = tiny.params(tiny.SOURCE, seed=9)["layers"]["mlp"]["up_kernel"]
  assert grown.ema is not None
  assert np.array_equal(grown.ema["layers"]["mlp"]["up_kernel"][:, 2], other)


def test_the_lineage_says_what_was_done():
  source = tiny.stored(tiny.SOURCE, moments=None)
  grown = scale_out(source, _mixture(_moe()), OPTIONS, seed=3, name="mixture")
  event = grown.lineage.events[-1]
  assert (event.kind, event.name) == ("scale_out", "mixture")
  assert event.parent == "dense"
  assert event.options["method"] == "sparse_upcycling"
  assert event.options["moe"]["num_experts"] == 4
  assert event.options["seed"] == 3
  assert event.growth == {
    "method": "sparse_upcycling",
    "exact": True,
    "reasons": [],
    "notes": [],
    "experts": "4 experts: 4 copies of an FFN, 10 hidden units an expert; a"
    " token meets 2",
    "parameters": [2640, 4896],
  }


def test_the_target_decides_the_parameter_dtype():
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = _mixture(_moe(), param_dtype="float32")
  grown = scale_out(source, target, OPTIONS)
  assert {x.dtype for x in jax.tree.leaves(grown.params)} == {
    jnp.dtype("float32")
  }


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(moe=None), "config.model.moe=None: expected the experts to make"),
    (
      dict(moe=MoeConfig(shared_expert_dim=11)),
      "config.model.moe.shared_expert_dim=11: expected 10 for a copy of the"
      " whole FFN, or less for a part of its units",
    ),
    (
      dict(sliding_window=5),
      "config.model.sliding_window=5: expected the source's None; Scale-Out"
      " makes experts of FFNs, Scale-Up changes sizes",
    ),
    (
      dict(mlp_dim=12),
      "config.model.mlp_dim=12: expected a divisor of 10, the hidden units that"
      " the routed experts share out; the nearest is 10",
    ),
    (
      dict(num_layers=4),
      "config.model.num_layers=4: expected the source's 3; Scale-Out makes"
      " experts of FFNs, Scale-Up changes sizes",
    ),
  ],
)
def test_a_target_that_is_not_the_source_with_experts_is_refused(
  fields, message
):
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, **(dict(moe=_moe()) | fields))
  with pytest.raises(errors.UserError) as caught:
    scale_out(source, target, OPTIONS)
  assert str(caught.value) == message


def test_exact_with_options_of_the_model():
  options: dict[str, Any] = dict(
    qk_norm=True,
    out_bias=True,
    sliding_window=4,
    rope_scaling=LinearRopeScaling(factor=3.0),
  )
  config = tiny.replace(tiny.SOURCE, **options)
  source = tiny.stored(config, moments=None)
  target = _mixture(_moe(), **options)
  grown = scale_out(source, target, OPTIONS)
  before = tiny.logits(config, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()


def test_stop_tokens_and_chat_template_are_kept():
  source = tiny.stored(
    tiny.SOURCE,
    moments=None,
    tokenizer=None,
    stop_tokens=(3, 5),
    chat_template="{{ x }}",
  )
  grown = scale_out(source, _mixture(_moe()), OPTIONS)
  assert grown.tokenizer is None
  assert grown.stop_tokens == (3, 5)
  assert grown.chat_template == "{{ x }}"


def test_a_masked_source_is_refused():
  mask = GrowthMask(
    value=0.5, embed_dim=8, mlp_dim=5, num_kv_heads=2, queries_per_kv=3
  )
  source = tiny.stored(tiny.SOURCE, moments=None)
  masked = tiny.replace(tiny.SOURCE, growth_mask=mask)
  source = dataclasses.replace(source, config=masked)
  target = tiny.replace(masked, moe=tiny.MOE)
  with pytest.raises(errors.UserError) as caught:
    scale_out(source, target, ScaleOut(source="dense"))
  assert str(caught.value) == (
    "the source's growth_mask is 0.5: what a masked growth added does not count"
    " whole; train the source with mask_steps until its mask is 1"
  )
