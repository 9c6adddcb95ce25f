"""Every method: what it makes, and that its exactness is predicted right."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import MeshConfig, ScaleUp
from aquila_jax.core.model_config import (
  GrowthMask,
  LinearRopeScaling,
)
from aquila_jax.growth.scale_up import plan_growth, scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings
from tests.growth import growing, tiny

DOUBLE = dict(embed_dim=16, mlp_dim=20, num_kv_heads=4, num_heads=12)
UNEVEN = dict(embed_dim=11, mlp_dim=17, num_heads=10)
DEEP = dict(num_layers=5)
# Of a residual of 8 that is padded to 11; 8 copied to 11 have no such number.
PADDED = dict(norm_epsilon=1e-5 * 8 / 11)
TIED = dict(tied_embeddings=True)


def _options(**fields) -> ScaleUp:
  return ScaleUp(source="dense", **fields)


# Source, target, options, and whether the function is kept.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], bool]]
PAIRS = {
  "fpi x2": ({}, DOUBLE, dict(method="fpi"), True),
  "fpi x2, noise": (TIED, DOUBLE, dict(method="fpi", split_noise=0.5), True),
  "fpi uneven": ({}, UNEVEN, dict(method="fpi"), False),
  "fpi of neurons and heads": (
    {},
    UNEVEN | dict(embed_dim=8),
    dict(method="fpi", width_map="random"),
    True,
  ),
  "hypercloning": ({}, DOUBLE, dict(method="hypercloning"), True),
  "hypercloning of a mixture": (
    dict(moe=tiny.MOE),
    DOUBLE,
    dict(method="hypercloning"),
    True,
  ),
  "lemon": ({}, UNEVEN | PADDED, dict(method="lemon"), True),
  "lemon, tied, deep": (
    TIED,
    UNEVEN | PADDED | DEEP,
    dict(method="lemon"),
    True,
  ),
  "lemon, head norms": (
    dict(qk_norm=True, out_bias=True),
    UNEVEN | PADDED | DEEP | dict(qk_norm_epsilon=1e-5),
    dict(method="lemon"),
    True,
  ),
  "lemon, head norms of another epsilon": (
    dict(qk_norm=True, norm_epsilon=0.3),
    UNEVEN | dict(norm_epsilon=0.3 * 8 / 11),
    dict(method="lemon"),
    False,
  ),
  "lemon, epsilon of the source": (
    dict(norm_epsilon=0.3),
    UNEVEN,
    dict(method="lemon"),
    False,
  ),
  "lemon, interpolated": (
    {},
    UNEVEN | PADDED | DEEP,
    dict(method="lemon", depth="interpolate"),
    False,
  ),
  "zero blocks of llama_pro": (
    dict(out_bias=True),
    DOUBLE | DEEP,
    dict(method="fpi", depth="llama_pro"),
    True,
  ),
  "zero blocks of lemon in a mixture": (
    dict(moe=dataclasses.replace(tiny.MOE, shared_expert_dim=5)),
    DOUBLE | DEEP,
    dict(method="fpi", depth="lemon"),
    True,
  ),
  "chosen layers": (
    {},
    DEEP,
    dict(method="fpi", layers=(0, 1, 1, 2, 2)),
    False,
  ),
  "solar": ({}, dict(num_layers=4), dict(method="fpi", depth="solar"), False),
  "msg": ({}, UNEVEN | DEEP, dict(method="msg"), True),
  "msg, whole groups, tied": (
    TIED,
    DOUBLE | DEEP,
    dict(method="msg", depth="stack"),
    True,
  ),
  "msg of a mixture": (
    dict(moe=tiny.MOE, qk_norm=True),
    UNEVEN,
    dict(method="msg"),
    True,
  ),
  "msg with layers that change places": (
    {},
    dict(num_layers=4),
    dict(method="msg", layers=(1, 0, 2, 2)),
    False,
  ),
  "bert2bert": ({}, DOUBLE | DEEP, dict(method="bert2bert"), False),
  "aki where nothing is new": ({}, {}, dict(method="aki"), True),
  "aki of one layer": (
    dict(num_layers=1),
    DOUBLE,
    dict(method="aki"),
    True,
  ),
  "more tokens": (
    {},
    dict(vocab_size=17),
    dict(method="fpi", vocabulary="mean"),
    True,
  ),
  "another base": (
    {},
    dict(rope_theta=300.0),
    dict(method="fpi", context="extend"),
    False,
  ),
  "interpolated positions": (
    {},
    dict(rope_scaling=LinearRopeScaling(factor=2.0)),
    dict(method="fpi", context="extend"),
    False,
  ),
}


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("name", PAIRS)
def test_exactness_is_predicted_and_found(name):
  before, after, chosen, exact = PAIRS[name]
  config = tiny.replace(tiny.SOURCE, **before)
  target = tiny.replace(config, **after)
  options = _options(**chosen)
  predicted = plan_growth(config, target, options).exactness
  assert predicted.exact == exact, predicted.in_words()
  assert bool(predicted.reasons) != exact
  difference = growing.difference(config, target, options)
  assert difference < growing.EXACT if exact else difference > 1e-4


def test_reasons_are_told():
  target = tiny.replace(tiny.SOURCE, **(UNEVEN | DEEP), rope_theta=300.0)
  plan = plan_growth(
    tiny.SOURCE, target, _options(method="aki", context="extend")
  )
  assert plan.exactness.reasons == (
    "embed is copied unevenly (x1 and x2), and RMSNorm takes the mean of the"
    " squares over it",
    "new indices of embed, mlp, q_per_kv compute what the next layer does",
    "layers run more than once or in another order (interpolate)",
    "rope_theta changes, which turns the heads otherwise",
  )
  assert plan.axes == {
    "layer": "3 -> 5 (interpolate): 2 copied twice, 1 copied once",
    "embed": "8 -> 11 (circular): 3 copied twice, 5 copied once",
    "mlp": "10 -> 17 (circular): 7 copied twice, 3 copied once",
    "q_per_kv": "3 -> 5 (circular): 2 copied twice, 1 copied once",
  }


def test_the_event_says_what_was_done():
  target = tiny.replace(tiny.SOURCE, **UNEVEN, **PADDED)
  _, grown = growing.grown(tiny.SOURCE, target, _options(method="lemon"))
  growth = grown.lineage.events[-1].growth
  assert growth is not None
  assert (growth["method"], growth["exact"]) == ("lemon", True)
  assert growth["axes"]["embed"] == (
    "8 -> 11 (padded): 8 copied once, 3 new, written by zeros"
  )
  assert growth["parameters"] == [
    sum(x.size for x in jax.tree.leaves(decoder_lm.abstract_params(c)))
    for c in (tiny.SOURCE, target)
  ]
  assert json.loads(json.dumps(growth)) == growth


# Which leaves gain something that is new, and where it is zero.
WRITERS = ("layers/attention/out_kernel", "layers/mlp/down_kernel")


def test_what_lemon_adds_to_the_residual_is_trained():
  """With zeros on both sides of the new indices nothing of them would be."""
  target = tiny.replace(tiny.SOURCE, **UNEVEN, **PADDED)
  _, grown = growing.grown(tiny.SOURCE, target, _options(method="lemon"))
  params = tiny.arrays(grown.params)
  for name in (*WRITERS, "embedding/table"):
    assert not params[name][..., 8:].any(), name
  norms = ("layers/attention_norm/scale", "layers/mlp_norm/scale")
  for name in (*norms, "final_norm/scale"):
    assert (params[name][..., 8:] > 0).all(), name
  gradient = tiny.gradients(target, grown.params)
  first = tiny.arrays(gradient)
  for name in (*WRITERS, "embedding/table"):
    # Tokens that are not in the text have no gradient in the table.
    new = first[name][..., 8:]
    assert np.abs(new).max(axis=tuple(range(new.ndim - 1))).min() > 0, name
  # After one step the new part of the residual is there to be read.
  stepped = jax.tree.map(lambda p, g: p - 0.1 * g, grown.params, gradient)
  second = tiny.arrays(tiny.gradients(target, stepped))
  for name in ("attention/query_kernel", "mlp/up_kernel", "mlp/gate_kernel"):
    assert np.abs(second[f"layers/{name}"][:, 8:]).min() > 0, name
  assert np.abs(second["lm_head/kernel"][8:]).min() > 0


@pytest.mark.parametrize(
  ("chosen", "apart"),
  [
    (dict(method="fpi"), False),
    (dict(method="hypercloning", split_noise=0.0), False),
    (dict(method="hypercloning"), True),
    (dict(method="fpi", split_noise=0.1), True),
  ],
)
def test_copies_have_gradients_of_their_own_under_noise(chosen, apart):
  target = tiny.replace(tiny.SOURCE, **DOUBLE)
  _, grown = growing.grown(tiny.SOURCE, target, _options(**chosen))
  up = tiny.arrays(tiny.gradients(target, grown.params))["layers/mlp/up_kernel"]
  one, other = up[..., :10], up[..., 10:]
  same = np.abs(one - other).max() < 1e-13 * np.abs(up).max()
  assert same != apart


def test_the_noise_has_the_size_that_was_asked_for():
  """Two copies: +-eta on a share of W / 2, of 10 dB less power."""
  config = tiny.replace(tiny.SOURCE, mlp_dim=400)
  target = tiny.replace(config, mlp_dim=800)
  source, grown = growing.grown(config, target, _options(method="hypercloning"))
  before = tiny.arrays(source.params)["layers/mlp/down_kernel"]
  after = tiny.arrays(grown.params)["layers/mlp/down_kernel"]
  one, other = after[:, :400], after[:, 400:]
  np.testing.assert_allclose(one + other, before, atol=1e-15)
  noise = one - before / 2
  power = np.mean(noise**2) / np.mean((before / 2) ** 2)
  assert power == pytest.approx(0.1, rel=0.05)


def test_zero_blocks_of_lemon_cancel_over_the_copies():
  target = tiny.replace(tiny.SOURCE, **DOUBLE, **DEEP)
  options = _options(method="fpi", depth="lemon")
  _, grown = growing.grown(tiny.SOURCE, target, options)
  params = tiny.arrays(grown.params)
  down = params["layers/mlp/down_kernel"][2]  # layers 0 1 1' 2 2'
  assert np.abs(down).min() > 0
  np.testing.assert_allclose(down[:10], -down[10:], atol=1e-15)
  # Without copies there is nothing that could cancel.
  deep = tiny.replace(tiny.SOURCE, **DEEP)
  _, grown = growing.grown(tiny.SOURCE, deep, options)
  assert not tiny.arrays(grown.params)["layers/mlp/down_kernel"][2].any()


@pytest.mark.parametrize("method", ["lemon", "hypercloning"])
def test_what_is_drawn_is_drawn_for_every_layer_and_from_the_seed(method):
  target = tiny.replace(
    tiny.SOURCE, **DOUBLE, num_layers=6, norm_epsilon=tiny.SOURCE.norm_epsilon
  )
  options = _options(method=method, depth="interpolate")
  source = tiny.stored(tiny.SOURCE, moments=None)
  one, same, other = (
    tiny.arrays(scale_up(source, target, options, seed=seed).params)
    for seed in (3, 3, 4)
  )
  name = "layers/mlp/down_kernel"
  assert np.array_equal(one[name], same[name])
  assert not np.array_equal(one[name], other[name])
  assert not np.array_equal(one[name][0], one[name][1])  # copies of layer 0


def test_moments_of_what_is_new_are_zero_and_norms_follow_their_factor():
  target = tiny.replace(tiny.SOURCE, **UNEVEN, **PADDED)
  source = tiny.stored(tiny.SOURCE)
  options = _options(method="lemon", split_noise=0.0)
  grown = scale_up(source, target, options)
  assert grown.moments is not None
  gradient = tiny.arrays(tiny.gradients(target, grown.params))
  mu, nu = tiny.arrays(grown.moments.mu), tiny.arrays(grown.moments.nu)
  scale = max(np.abs(leaf).max() for leaf in gradient.values())
  for name, axes in tiny.named(decoder_lm.parameter_axes(target)).items():
    old = tuple(
      slice(0, 8) if axis.name == "embed" else slice(None) for axis in axes.axes
    )
    # What was there has the gradient that it has in the grown model.
    np.testing.assert_allclose(
      mu[name][old], gradient[name][old], rtol=0, atol=1e-13 * scale
    )
    np.testing.assert_allclose(
      nu[name][old], gradient[name][old] ** 2, rtol=0, atol=1e-13 * scale**2
    )
    rest = np.ones(mu[name].shape, bool)
    rest[old] = False
    assert not mu[name][rest].any()
    assert not nu[name][rest].any()


def test_a_masked_growth_keeps_the_source_in_front_and_draws_the_rest():
  target = tiny.replace(tiny.SOURCE, **UNEVEN, **DEEP)
  source = tiny.stored(tiny.SOURCE)
  grown = scale_up(source, target, _options(method="msg"))
  mask = grown.config.growth_mask
  assert mask is not None
  # Layers 0 0 1 1 2.
  assert mask == GrowthMask(
    embed_dim=8,
    mlp_dim=10,
    num_kv_heads=2,
    queries_per_kv=3,
    new_layers=(1, 3),
  )
  assert grown.config == dataclasses.replace(target, growth_mask=mask)
  assert grown.moments is not None
  before = tiny.arrays(source.params)
  after, mu = tiny.arrays(grown.params), tiny.arrays(grown.moments.mu)
  for name, leaf in before.items():
    stacked = name.startswith("layers/")
    old = [0, 2, 4] if stacked else slice(None)
    lead = tuple(slice(0, n) for n in leaf.shape[stacked:])
    front = (slice(None), *lead) if stacked else lead
    np.testing.assert_array_equal(after[name][old][front], leaf)
    assert mu[name][old][front].any(), name
    if not name.endswith("bias"):
      rest = np.ones(after[name][old].shape, bool)
      rest[front] = False
      assert (after[name][old][rest] != 0).all(), name
      assert not mu[name][old][rest].any()
    if stacked:
      assert not mu[name][[1, 3]].any()
  # Also where the target repeats the mask, as --target does.
  for wider in (target, grown.config):
    with pytest.raises(errors.UserError) as caught:
      scale_up(grown, tiny.replace(wider, embed_dim=16), _options(method="fpi"))
    assert str(caught.value) == (
      "the source's growth_mask is 0: what a masked growth added does not count"
      " whole; train the source with mask_steps until its mask is 1"
    )


def test_new_tokens_are_the_mean_of_all_or_copies_that_are_given(tmp_path):
  target = tiny.replace(tiny.SOURCE, vocab_size=16, embed_dim=16)
  file = tmp_path / "maps.json"
  file.write_text(json.dumps({"vocab": [*range(13), 4, None, 2]}))
  source = tiny.stored(tiny.SOURCE)
  mean = scale_up(source, target, _options(method="fpi", vocabulary="mean"))
  given = scale_up(
    source,
    target,
    _options(method="fpi", vocabulary="mean", maps=str(file)),
  )
  table = np.asarray(source.params["embedding"]["table"])
  head = np.asarray(source.params["lm_head"]["kernel"])
  rows = np.stack([table.mean(0)] * 3)
  columns = np.stack([head.mean(1)] * 3, axis=1)
  np.testing.assert_allclose(
    mean.params["embedding"]["table"], np.tile(np.vstack([table, rows]), 2)
  )
  np.testing.assert_allclose(
    mean.params["lm_head"]["kernel"],
    np.tile(np.hstack([head, columns]), (2, 1)) / 2,
  )
  chosen = np.vstack([table, table[4:5], table.mean(0)[None], table[2:3]])
  np.testing.assert_allclose(
    given.params["embedding"]["table"], np.tile(chosen, 2)
  )
  assert mean.moments is not None
  assert not np.asarray(mean.moments.mu["embedding"]["table"])[13:].any()
  assert mean.lineage.new_indices is not None
  assert mean.lineage.new_indices["vocab"] == [[13, 16]]


@pytest.mark.parametrize(
  ("fields", "chosen", "message"),
  [
    (
      dict(embed_dim=11),
      dict(method="hypercloning"),
      "config.model.embed_dim: embed grows from 8 to 11; expected a multiple,"
      " as 8 or 16; method='hypercloning' copies everything equally often,"
      " method='lemon' is exact at any size",
    ),
    (
      dict(embed_dim=11, norm_epsilon=2e-5),
      dict(method="lemon"),
      "config.model.norm_epsilon=2e-05: expected the source's 1e-05, or"
      " 7.27272727e-06, at which these maps are exact",
    ),
    (
      dict(norm_epsilon=2e-5),
      dict(method="fpi"),
      "config.model.norm_epsilon=2e-05: expected the source's 1e-05; another"
      " epsilon changes every norm",
    ),
    (
      dict(num_layers=5),
      dict(method="fpi", depth="solar"),
      "config.model.num_layers=5: expected an even number from 3 to 6;"
      " depth='solar' joins as many layers of the bottom as of the top",
    ),
    (
      dict(vocab_size=10),
      dict(method="fpi", vocabulary="mean"),
      "config.model.vocab_size=10: expected the source's 13 or more; Scale-Up"
      " does not shrink",
    ),
  ],
)
def test_pairs_that_do_not_fit_a_method_are_refused(fields, chosen, message):
  target = tiny.replace(tiny.SOURCE, **fields)
  with pytest.raises(errors.UserError) as caught:
    plan_growth(tiny.SOURCE, target, _options(**chosen))
  assert str(caught.value) == message


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("method", ["lemon", "aki"])
def test_growth_onto_a_mesh_is_growth_and_lies_where_it_should(method):
  config = tiny.replace(tiny.SOURCE, moe=tiny.MOE, vocab_size=16)
  target = tiny.replace(
    config,
    embed_dim=16,
    mlp_dim=16,
    num_layers=4,
    vocab_size=18,
    norm_epsilon=1e-5 * (0.5 if method == "lemon" else 1),
  )
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  shardings = param_shardings(
    decoder_lm.parameter_axes(target), decoder_lm.abstract_params(target), mesh
  )
  source = tiny.stored(config)
  options = _options(method=method, vocabulary="mean")
  expected = scale_up(source, target, options)
  found = scale_up(source, target, options, shardings=shardings)

  def same(one, other, sharding):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert one.sharding == sharding

  jax.tree.map(same, found.params, expected.params, shardings)
  assert found.moments is not None
  assert expected.moments is not None
  jax.tree.map(same, found.moments.nu, expected.moments.nu, shardings)
