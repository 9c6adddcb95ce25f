"""Every way from FFNs to experts, against a loop over tokens in NumPy."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.growth import upcycling_exactness
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from aquila_jax.growth.upcycling import make_upcycling
from tests.growth import routing_oracle, tiny

# Sums of ten products in float64.
EXACT = 1e-12
DENSE = tiny.replace(tiny.SOURCE, mlp_dim=12)
WIDTH = DENSE.mlp_dim


def _moe(**fields) -> MoeConfig:
  defaults: dict[str, Any] = dict(
    num_experts=4, top_k=2, block_size=4, router_init_std=0.5
  )
  return MoeConfig(**(defaults | fields))


def _target(source: ModelConfig, moe: MoeConfig | None, **fields):
  return tiny.replace(source, moe=moe, **fields)


def _stored(config: ModelConfig, **fields) -> StoredModel:
  return tiny.stored(config, **(dict(moments=None) | fields))


def _grow(
  source: StoredModel, target: ModelConfig, **options
) -> dict[str, np.ndarray]:
  """The FFN leaves of the grown model, by their last names."""
  sample = options.pop("sample", None)
  others = options.pop("others", ())
  chosen = ScaleOut(source="dense", **options)
  grown = scale_out(
    source, target, chosen, sample=sample, others=others, seed=3
  )
  return routing_oracle.leaves_of(tiny.arrays(grown.params))


def _inputs(seed: int = 5) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal((9, DENSE.embed_dim))


def _apart(source: StoredModel, leaves, moe: MoeConfig) -> float:
  """How far the FFNs are from those of `leaves`, relative to the largest.

  Of all layers.
  """
  x = _inputs()
  before = routing_oracle.leaves_of(tiny.arrays(source.params))
  largest = 0.0
  for layer in range(DENSE.num_layers):
    old = routing_oracle.ffn(x, before, layer, source.config.moe)
    new = routing_oracle.ffn(x, leaves, layer, moe)
    largest = max(largest, float(np.abs(new - old).max() / np.abs(old).max()))
  return largest


def _is_exact(source: ModelConfig, target: ModelConfig, **options) -> bool:
  """Whether it is predicted."""
  way = make_upcycling(source, target, ScaleOut(source="", **options), path="")
  return upcycling_exactness.predict(way, source, target).exact


def _difference(
  source: StoredModel, target: ModelConfig, **options
) -> tuple[float, bool]:
  """What is measured, and what is predicted."""
  assert target.moe is not None
  leaves = _grow(source, target, **options)
  return (
    _apart(source, leaves, target.moe),
    _is_exact(source.config, target, **options),
  )


SHARED: dict[str, dict[str, Any]] = {
  "none": {},
  "whole, gated": dict(shared_expert_dim=12),
  "whole": dict(shared_expert_dim=12, shared_expert_gate=False),
  "part, gated": dict(shared_expert_dim=6),
  "part": dict(shared_expert_dim=6, shared_expert_gate=False),
}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_function_is_kept_where_it_is_predicted(shards, shared):
  source = _stored(DENSE)
  options = SHARED[shared]
  routed = WIDTH - options.get("shared_expert_dim", 0) % WIDTH
  method = "sparse_upcycling" if shards == 1 else "granular"
  first = _moe(num_experts=6, **options)
  target = _target(DENSE, first, mlp_dim=routed // shards)
  # As long as gates sum to one nothing else is asked of the router.
  leaves = _grow(source, target, method=method)
  seen = set()
  for order, renormalise, top_k in itertools.product(
    ("topk_then_softmax", "softmax_then_topk"), (True, False), (1, 2, 3, 4, 6)
  ):
    moe = dataclasses.replace(
      first, top_k=top_k, router_order=order, renormalise=renormalise
    )
    apart = _apart(source, leaves, moe)
    exact = _is_exact(DENSE, tiny.replace(target, moe=moe), method=method)
    all_met = top_k == 6 and order == "softmax_then_topk"
    if not (all_met and not renormalise):  # where they sum to one by accident
      assert exact == (apart < EXACT), (order, renormalise, top_k)
      assert exact or apart > 1e-3
    seen.add(exact)
  assert seen == {True, False}


def test_a_capacity_that_drops_nothing_is_exact():
  for factor, exact in ((2.0, True), (1.9, False)):
    moe = _moe(capacity_factor=factor)
    plan = plan_scale_out(DENSE, _target(DENSE, moe), ScaleOut(source="dense"))
    assert plan.exactness.exact == exact


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize(("copies", "shards"), [(2, 1), (3, 2)])
def test_a_mixture_grows_where_top_k_grows_as_often(copies, shards, shared):
  old = _moe(num_experts=4, top_k=2, shared_expert_dim=shared)
  source = _stored(_target(DENSE, old))
  method = "sparse_upcycling" if shards == 1 else "granular"
  first = dataclasses.replace(old, num_experts=4 * copies * shards)
  target = _target(DENSE, first, mlp_dim=WIDTH // shards)
  leaves = _grow(source, target, method=method)
  needed = 2 * copies * shards
  for order, renormalise, top_k in itertools.product(
    ("topk_then_softmax", "softmax_then_topk"),
    (True, False),
    (2, needed - 1, needed, needed + copies),
  ):
    kind: dict[str, Any] = dict(router_order=order, renormalise=renormalise)
    config = _target(DENSE, dataclasses.replace(old, **kind))
    moe = dataclasses.replace(first, top_k=top_k, **kind)
    apart = _apart(dataclasses.replace(source, config=config), leaves, moe)
    exact = _is_exact(config, tiny.replace(target, moe=moe), method=method)
    assert exact == (top_k == needed)
    assert exact == (apart < EXACT)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
  ("fields", "exact"),
  [
    (dict(gate_scale=2.5), True),
    (dict(router_order="softmax_then_topk", gate_scale=0.5), True),
    (dict(router_order="sigmoid", gate_scale=2.5), True),
    (dict(router_order="sigmoid", renormalise=False), False),
    (dict(router_order="sigmoid", selection_bias=True), True),
    # Groups of two experts, which are those of a copy, or three.
    (dict(num_groups=3, top_groups=2), True),
    (dict(num_groups=3, top_groups=2, group_score="top2_sum"), True),
    (dict(num_groups=2, top_groups=1, top_k=2), None),
    (
      dict(router_order="sigmoid", choice="expert", renormalise=False),
      False,
    ),
  ],
)
def test_other_routers_keep_the_function_where_their_gates_allow(
  fields, exact, shards
):
  source = _stored(DENSE)
  moe = _moe(**(dict(num_experts=6, top_k=2) | fields))
  target = _target(DENSE, moe, mlp_dim=WIDTH // shards)
  method = "sparse_upcycling" if shards == 1 else "granular"
  options: dict[str, Any] = dict(method=method, gate_constant="uniform")
  predicted = _is_exact(DENSE, target, **options)
  if exact is None:  # groups of three cut through copies of two
    exact = shards == 1
  assert predicted == exact
  if moe.choice == "token":
    apart = _apart(source, _grow(source, target, **options), moe)
    # On these inputs it may not show that a copy is cut.
    assert (apart < EXACT) == exact or fields.get("num_groups") == 2


@pytest.mark.parametrize(
  ("fields", "exact"),
  [
    (dict(router_order="sigmoid", renormalise=False), True),
    (dict(router_order="sigmoid", gate_scale=2.5), True),
    (dict(router_order="softmax_then_topk", selection_bias=True), True),
    (dict(router_order="sigmoid", selection_bias=True), True),
    (dict(num_groups=2, top_groups=1), True),
    (dict(num_groups=2, top_groups=1, group_score="top2_sum"), False),
  ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_mixture_with_another_router_grows_as_well(fields, exact, shards):
  old = _moe(**(dict(num_experts=4, top_k=2) | fields))
  source = _stored(_target(DENSE, old))
  new = dataclasses.replace(old, num_experts=8 * shards, top_k=4 * shards)
  target = _target(DENSE, new, mlp_dim=WIDTH // shards)
  method = "sparse_upcycling" if shards == 1 else "granular"
  difference, predicted = _difference(source, target, method=method)
  assert predicted == exact
  # Two groups seldom change places by that; where they do not it is exact.
  assert (difference < EXACT) or not exact


def test_what_changes_experts_is_not_exact_and_says_so():
  source, target = _stored(DENSE), _target(DENSE, _moe())
  cases: list[tuple[dict[str, Any], str]] = [
    (dict(method="drop_upcycling"), "50 % of the hidden units are drawn anew"),
    (
      dict(method="noise"),
      "noise of 0.1 standard deviations is added to 50 % of the entries",
    ),
    (
      dict(method="sparse_upcycling", redraw=0.25),
      "25 % of the hidden units are drawn anew",
    ),
  ]
  for options, words in cases:
    difference, exact = _difference(source, target, **options)
    assert not exact
    assert difference > 1e-3
    plan = plan_scale_out(DENSE, target, ScaleOut(source="", **options))
    assert plan.exactness.reasons == (words,)
    assert plan.exactness.in_words() == f"not exact: {words}"


def test_cube_roots_are_not_exact_where_they_scale():
  target = _target(DENSE, _moe(num_experts=8, top_k=4), mlp_dim=6)
  found = {
    kernels: _difference(
      _stored(DENSE), target, method="granular", scaled_kernels=kernels
    )
    for kernels in ("down", "all")
  }
  assert found["down"][0] < EXACT
  assert found["down"][1]
  assert found["all"][0] > 1e-2
  assert not found["all"][1]
  # Where there is nothing to scale there is nothing to be wrong.
  plain = _difference(
    _stored(DENSE), _target(DENSE, _moe()), scaled_kernels="all"
  )
  assert plain[0] < EXACT
  assert plain[1]


def test_drop_upcycling_draws_the_same_units_of_all_three_kernels():
  wide = tiny.replace(DENSE, mlp_dim=400)
  source = _stored(wide)
  before = routing_oracle.leaves_of(tiny.arrays(source.params))
  after = _grow(
    source, _target(wide, _moe()), method="drop_upcycling", redraw=0.25
  )
  seen = []
  for layer, expert in itertools.product(range(3), range(4)):
    place = (layer, expert)
    new = {
      name: np.any(after[name][place] != before[name][layer], axis=axis)
      for name, axis in (
        ("gate_kernel", 0),
        ("up_kernel", 0),
        ("down_kernel", 1),
      )
    }
    units = new["gate_kernel"]
    assert units.sum() == 100
    assert np.array_equal(units, new["up_kernel"])
    assert np.array_equal(units, new["down_kernel"])
    seen.append(units)
    for name, of in (("up_kernel", np.s_[:, units]), ("down_kernel", units)):
      drawn, replaced = after[name][place][of], before[name][layer][of]
      # 800 draws each: 4 standard errors.
      error = 4 / np.sqrt(drawn.size)
      assert abs(drawn.mean() - replaced.mean()) < error * replaced.std()
      assert abs(drawn.std() / replaced.std() - 1) < error
      assert np.abs(drawn - replaced).min() > 0
  assert len({units.tobytes() for units in seen}) == len(seen)


def test_drop_upcycling_as_published_draws_units_of_their_own():
  source = _stored(tiny.replace(DENSE, mlp_dim=40))
  before = routing_oracle.leaves_of(tiny.arrays(source.params))
  target = _target(source.config, _moe())
  after = _grow(
    source, target, method="drop_upcycling", redraw_units="independent"
  )
  gate, up = (
    np.any(after[name][0, 1] != before[name][0], axis=0)
    for name in ("gate_kernel", "up_kernel")
  )
  assert gate.sum() == up.sum() == 20
  assert not np.array_equal(gate, up)


def test_noise_has_the_given_size_on_the_given_share():
  wide = tiny.replace(DENSE, mlp_dim=400)
  source = _stored(wide)
  before = routing_oracle.leaves_of(tiny.arrays(source.params))
  after = _grow(
    source, _target(wide, _moe()), method="noise", noise=0.2, noise_share=0.3
  )
  for name in ("gate_kernel", "up_kernel", "down_kernel"):
    added = after[name][1, 2] - before[name][1]
    hit = added != 0
    # 3,200 entries: 4 standard errors.
    assert abs(hit.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 3200)
    size = added[hit].std() / before[name][1].std()
    assert abs(size / 0.2 - 1) < 4 / np.sqrt(2 * hit.sum())
    assert not np.array_equal(added, after[name][1, 3] - before[name][1])


def test_in_a_larger_mixture_only_the_copies_change():
  source = _stored(_target(DENSE, _moe(num_experts=2)))
  target = _target(DENSE, _moe(num_experts=6, top_k=6))
  after = _grow(source, target, method="drop_upcycling")
  before = routing_oracle.leaves_of(tiny.arrays(source.params))
  for expert in range(6):
    same = np.array_equal(
      after["up_kernel"][0, expert], before["up_kernel"][0, expert // 3]
    )
    assert same == (expert % 3 == 0)


def test_the_average_is_drawn_as_the_parameters_are():
  """What is new in the one is the same in the other, and noise as large."""
  ema = tiny.params(DENSE, seed=9)
  source = _stored(DENSE, ema=ema)
  options = ScaleOut(source="", method="drop_upcycling", noise=0.3)
  grown = scale_out(source, _target(DENSE, _moe()), options, seed=1)
  assert grown.ema is not None
  after, average = (
    tree["layers"]["mlp"]["up_kernel"] for tree in (grown.params, grown.ema)
  )
  own, others = (
    np.asarray(tree["layers"]["mlp"]["up_kernel"])
    for tree in (source.params, ema)
  )
  drawn = np.asarray(after == average)
  assert np.array_equal(drawn.all(2), drawn.any(2))
  assert (drawn.any(2).sum(-1) == 6).all()
  noise = np.asarray(after - own[:, None])[~drawn]
  noise_of_average = np.asarray(average - others[:, None])[~drawn]
  np.testing.assert_allclose(noise, noise_of_average, rtol=0, atol=1e-6)
  routers = [
    t["layers"]["mlp"]["router"]["kernel"] for t in (grown.params, grown.ema)
  ]
  assert np.array_equal(*routers)


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("shards", [1, 2])
def test_moments_are_the_gradients_of_even_gates(shards, shared):
  """With a router of nearly nothing and all experts met, exactly."""
  options = SHARED[shared]
  routed = WIDTH - options.get("shared_expert_dim", 0) % WIDTH
  source = tiny.stored(DENSE)
  moe = _moe(
    num_experts=2 * shards,
    top_k=2 * shards,
    router_init_std=1e-12,
    **options,
  )
  target = _target(DENSE, moe, mlp_dim=routed // shards)
  method = "sparse_upcycling" if shards == 1 else "granular"
  grown = scale_out(source, target, ScaleOut(source="", method=method))
  _assert_moments_are_gradients(grown, zero=("router", "token_gate_kernel"))


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("shards", [1, 2])
def test_moments_of_a_larger_mixture_are_its_gradients(shards):
  old = _moe(num_experts=2, top_k=2, shared_expert_dim=5)
  source = tiny.stored(_target(DENSE, old))
  new = dataclasses.replace(old, num_experts=6 * shards, top_k=6 * shards)
  target = _target(DENSE, new, mlp_dim=WIDTH // shards)
  method = "sparse_upcycling" if shards == 1 else "granular"
  grown = scale_out(source, target, ScaleOut(source="", method=method))
  # Shards of an expert have outputs of their own, and their router rows
  # gradients of their own, whose mean is that of the moments.
  skip = "router" if shards > 1 else "no leaf"
  _assert_moments_are_gradients(grown, skip=skip)
  gradients = tiny.arrays(tiny.gradients(target, grown.params))
  assert grown.moments is not None
  for tree, power in ((grown.moments.mu, 1), (grown.moments.nu, 2)):
    moment = tiny.arrays(tree)["layers/mlp/router/kernel"]
    rows = gradients["layers/mlp/router/kernel"]
    rows = rows.reshape(*rows.shape[:-1], 2, -1).mean(-1, keepdims=True)
    rows = np.broadcast_to(rows, (*rows.shape[:-1], 3 * shards))
    np.testing.assert_allclose(
      moment, rows.reshape(moment.shape) ** power, rtol=1e-8, atol=1e-15
    )


def _assert_moments_are_gradients(
  grown: StoredModel, *, skip: str = "no leaf", zero: tuple[str, ...] = ()
) -> None:
  gradients = tiny.arrays(tiny.gradients(grown.config, grown.params))
  assert grown.moments is not None
  mu, nu = tiny.arrays(grown.moments.mu), tiny.arrays(grown.moments.nu)
  for name, gradient in gradients.items():
    is_zero = any(part in name for part in zero)
    if is_zero:
      assert not mu[name].any()
      assert not nu[name].any()
    if skip in name or is_zero:
      continue
    size = np.abs(gradient).max()
    # The router of nearly nothing leaves 1e-12 of unevenness.
    np.testing.assert_allclose(mu[name], gradient, rtol=0, atol=1e-10 * size)
    np.testing.assert_allclose(
      nu[name], gradient**2, rtol=0, atol=1e-10 * size**2
    )


def test_units_drawn_anew_have_no_past():
  source = tiny.stored(DENSE)
  options = ScaleOut(source="", method="drop_upcycling")
  grown = scale_out(source, _target(DENSE, _moe()), options, seed=4)
  assert grown.moments is not None
  after, mu, nu = (
    np.asarray(tree["layers"]["mlp"]["down_kernel"])
    for tree in (grown.params, grown.moments.mu, grown.moments.nu)
  )
  before = np.asarray(source.params["layers"]["mlp"]["down_kernel"])
  drawn = np.any(after != before[:, None], axis=-1)
  assert (drawn.sum(-1) == 6).all()
  for moment in (mu, nu):
    assert not moment[drawn].any()
    assert (moment[~drawn] != 0).any(-1).all()


def test_branch_train_mix_takes_ffns_from_all_and_averages_the_rest():
  trees = [tiny.params(DENSE, seed=seed) for seed in (0, 1, 2)]
  common = Event(kind="train", steps=5, tokens=50, flops=500.0)
  models = [
    _stored(
      DENSE,
      params=tree,
      lineage=Lineage(
        events=(
          Event(kind="scratch"),
          common,
          Event(kind="train", name=str(i), steps=1, tokens=10 + i, flops=100.0),
        )
      ),
    )
    for i, tree in enumerate(trees)
  ]
  options = ScaleOut(
    source="a",
    method="branch_train_mix",
    sources=("b", "c"),
    optimizer="reset",
  )
  target = _target(DENSE, _moe(num_experts=6))
  grown = scale_out(models[0], target, options, others=models[1:])
  found, given = tiny.arrays(grown.params), [tiny.arrays(t) for t in trees]
  for name in given[0]:
    if name.startswith("layers/mlp/"):
      for expert in range(6):
        wanted = given[expert % 3][name]
        assert np.array_equal(found[name][:, expert], wanted)
    else:
      mean = np.mean([tree[name] for tree in given], axis=0)
      np.testing.assert_allclose(found[name], mean, rtol=0, atol=1e-15)
  # What the branches have in common was paid for once.
  assert grown.lineage.tokens == 50 + 10 + 11 + 12
  assert grown.lineage.flops == 800.0
  assert grown.lineage.steps == 6
  plan = plan_scale_out(DENSE, target, options)
  assert plan.exactness.reasons == (
    "3 models give experts, and the rest is their mean",
  )


def test_one_model_for_another_is_refused():
  other = tiny.replace(DENSE, rope_theta=7.0)
  options = ScaleOut(
    source="a", method="branch_train_mix", sources=("b",), optimizer="reset"
  )
  with pytest.raises(errors.UserError) as caught:
    scale_out(
      _stored(DENSE),
      _target(DENSE, _moe()),
      options,
      others=[_stored(other)],
    )
  assert str(caught.value) == (
    "sources[0]: its rope_theta is 7.0, the source's 100.0; expected models of"
    " one architecture"
  )


def test_experts_that_are_the_same_merge_into_the_ffn_they_are():
  dense = _stored(DENSE)
  for shared in (0, 6):
    moe = _moe(shared_expert_dim=shared, shared_expert_gate=False)
    mixture = scale_out(
      dense,
      _target(DENSE, moe, mlp_dim=WIDTH - shared),
      ScaleOut(source=""),
    )
    options = ScaleOut(source="", method="average", optimizer="reset")
    merged = scale_out(mixture, DENSE, options)
    before, after = tiny.arrays(dense.params), tiny.arrays(merged.params)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
      np.testing.assert_allclose(after[name], leaf, rtol=0, atol=1e-15)


REFUSED: dict[str, tuple[Any, Any, str]] = {
  "a width that does not divide": (
    dict(mlp_dim=7),
    {},
    "config.model.mlp_dim=7: expected a divisor of 12, the hidden units that"
    " the routed experts share out; the nearest is 6",
  ),
  "a cut where FFNs are copied whole": (
    dict(mlp_dim=6),
    {},
    "config.model.mlp_dim=6: expected 12; sparse upcycling copies an FFN whole,"
    " method='granular' cuts it",
  ),
  "no cut where FFNs are cut": (
    {},
    dict(method="granular"),
    "config.model.mlp_dim=12: expected a part of 12, such as 6;"
    " method='granular' cuts an FFN into shards",
  ),
  "experts that are no whole copies": (
    dict(mlp_dim=4),
    dict(method="granular"),
    "config.model.moe.num_experts=4: expected a multiple of 3 in 3 shards each",
  ),
  "a shared expert that is wider": (
    dict(moe=_moe(shared_expert_dim=13)),
    {},
    "config.model.moe.shared_expert_dim=13: expected 12 for a copy of the whole"
    " FFN, or less for a part of its units",
  ),
  "one FFN of none": (
    dict(moe=None),
    dict(method="average", optimizer="reset"),
    "config.init.method='average': the source is dense; expected a mixture",
  ),
  "models that give unequal numbers": (
    {},
    dict(method="branch_train_mix", sources=("a", "b"), optimizer="reset"),
    "config.model.moe.num_experts=4: expected a multiple of 3, so that each of"
    " 3 models gives as many experts",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_cannot_be_made_is_refused(case):
  fields, options, message = REFUSED[case]
  target = tiny.replace(DENSE, **(dict(moe=_moe()) | fields))
  with pytest.raises(errors.UserError) as caught:
    plan_scale_out(DENSE, target, ScaleOut(source="", **options))
  assert str(caught.value) == message


REFUSED_OF_MIXTURES: dict[str, tuple[Any, Any, str]] = {
  "another router": (
    dict(moe=_moe(num_experts=8, renormalise=False)),
    {},
    "config.model.moe.renormalise=False: expected the source's True; a mixture"
    " grows in the number of its experts",
  ),
  "fewer experts": (
    dict(moe=_moe(num_experts=2)),
    {},
    "config.model.moe.num_experts=2: expected a multiple of 4, the source's 4"
    " experts",
  ),
  "rows from text": (
    dict(moe=_moe(num_experts=8)),
    dict(router="clusters"),
    "config.init.router='clusters': expected 'normal'; the source has experts,"
    " and their rows are kept",
  ),
  "an FFN of another width": (
    dict(moe=None, mlp_dim=6),
    dict(method="average", optimizer="reset"),
    "config.model.mlp_dim=6: expected 12, the hidden units of an expert",
  ),
}


@pytest.mark.parametrize("case", REFUSED_OF_MIXTURES)
def test_a_mixture_that_cannot_become_the_target_is_refused(case):
  fields, options, message = REFUSED_OF_MIXTURES[case]
  source = _target(DENSE, _moe())
  with pytest.raises(errors.UserError) as caught:
    plan_scale_out(
      source, tiny.replace(source, **fields), ScaleOut(source="", **options)
    )
  assert str(caught.value) == message


def test_a_gate_that_no_ffn_can_hold_is_refused():
  source = _target(DENSE, _moe(shared_expert_dim=3))
  options = ScaleOut(source="", method="average", optimizer="reset")
  with pytest.raises(errors.UserError) as caught:
    plan_scale_out(source, tiny.replace(DENSE, mlp_dim=15), options)
  assert str(caught.value) == (
    "config.init.method='average': the source's shared expert has a gate"
    " (moe.shared_expert_gate), and no dense FFN can hold one"
  )


def test_a_whole_model_is_what_its_layers_are():
  """One of each kind through the decoder itself."""
  source = _stored(DENSE)
  before = tiny.logits(DENSE, source.params)
  for moe, width in (
    (_moe(num_experts=6, top_k=4, shared_expert_dim=6), 3),
    (_moe(num_experts=8, top_k=4, router_order="softmax_then_topk"), 6),
  ):
    target = _target(DENSE, moe, mlp_dim=width)
    options = ScaleOut(source="", method="granular")
    grown = scale_out(source, target, options)
    after = tiny.logits(target, grown.params)
    assert np.abs(after - before).max() < EXACT * np.abs(before).max()
    assert jax.tree.structure(grown.params) == jax.tree.structure(
      tiny.params(target)
    )
