"""Growth of and into models with experts in some of their layers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import model_dir
from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import ScaleOut, ScaleUp
from aquila_jax.core.moments import AdamMoments
from aquila_jax.growth import axis_map, checking, depth, ligo
from aquila_jax.growth.calibration import calibrate
from aquila_jax.growth.grown_tree import ArrayTree
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from aquila_jax.growth.scale_up import make_growth, plan_growth, scale_up
from aquila_jax.growth.streaming import stream_scale_out, stream_scale_up
from aquila_jax.models import decoder_lm
from tests.growth import tiny
from tests.growth.calibration_test import SAMPLE
from tests.growth.growing import EXACT

DENSE = tiny.replace(tiny.SOURCE, num_layers=4)


def _mixed(layers: Any, **fields: Any):
  moe = dataclasses.replace(tiny.MOE, layers=layers)
  return tiny.replace(DENSE, moe=moe, **fields)


def _uneven(layers: Any, dense_mlp_dim: int, **fields: Any):
  """With FFNs of another width than experts."""
  moe = dataclasses.replace(
    tiny.MOE, layers=layers, dense_mlp_dim=dense_mlp_dim
  )
  return tiny.replace(DENSE, moe=moe, **fields)


MIXED = _mixed("every_second")
UNEVEN = _uneven("every_second", 14)
WIDE: dict[str, Any] = dict(embed_dim=16, mlp_dim=20)


def _stored(config, **fields):
  """With moments and an average of no meaning."""
  tree = tiny.params(config)
  moments = AdamMoments(
    count=jnp.asarray(7, jnp.int32),
    mu=tree,
    nu=jax.tree.map(jnp.square, tree),
  )
  ema = jax.tree.map(lambda leaf: 2 * leaf, tree)
  return tiny.stored(config, moments=moments, ema=ema, **fields)


def _layer(tree, layer: int, moe_layers: tuple[int, ...]):
  """The leaves of a layer, with those of its FFN under one name."""
  part, rows = "dense_mlp", [i for i in range(99) if i not in moe_layers]
  if layer in moe_layers:
    part, rows = "mlp", list(moe_layers)
  leaves = {}
  for name, leaf in tiny.arrays(tree["layers"]).items():
    if name.startswith(("mlp/", "dense_mlp/")):
      if name.startswith(f"{part}/"):
        leaves[name.partition("/")[2]] = leaf[rows.index(layer)]
    else:
      leaves[name] = leaf[layer]
  return leaves


def _assert_same(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    found,
    expected,
  )


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize(
  ("model", "target"),
  [
    (MIXED, tiny.replace(MIXED, **WIDE)),
    (UNEVEN, _uneven("every_second", 28, **WIDE)),
  ],
  ids=["even", "uneven"],
)
def test_twice_the_width_keeps_logits_and_halves_moments_of_what_is_written(
  model, target
):
  source = _stored(model)
  grown = scale_up(source, target, ScaleUp(source="s", method="fpi"))
  before = tiny.logits(model, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()
  assert source.moments is not None and grown.moments is not None
  # Two copies of every index share its gradient.
  for part in ("mlp", "dense_mlp"):
    for power, old, new in (
      (1, source.moments.mu, grown.moments.mu),
      (2, source.moments.nu, grown.moments.nu),
    ):
      for name in ("gate_kernel", "down_kernel"):
        leaf = np.asarray(old["layers"][part][name])
        copied = np.concatenate([leaf, leaf], axis=-1)
        copied = np.concatenate([copied, copied], axis=-2)
        np.testing.assert_array_equal(
          new["layers"][part][name], copied / 2**power
        )


@pytest.mark.parametrize("method", ["fpi", "lemon"])
def test_ffns_and_experts_grow_apart(method):
  """Twice the FFNs, experts as they are; and the other way round."""
  options = ScaleUp(source="s", method=method)
  source = tiny.stored(UNEVEN, moments=None)
  before = tiny.logits(UNEVEN, source.params)
  for dense, mlp_dim in ((28, 10), (14, 20)):
    target = _uneven((1, 3), dense, mlp_dim=mlp_dim)
    plan = plan_growth(UNEVEN, target, options)
    assert plan.exactness.exact
    assert list(plan.axes) == ["dense_mlp" if dense == 28 else "mlp"]
    grown = scale_up(source, target, options)
    after = tiny.logits(target, grown.params)
    assert np.abs(after - before).max() < EXACT * np.abs(before).max()


def test_a_map_of_ffns_is_not_of_experts(tmp_path):
  file = tmp_path / "maps.json"
  chosen = [*range(14), 13, 0]
  file.write_text(json.dumps({"dense_mlp": chosen}))
  options = ScaleUp(source="s", method="fpi", maps=str(file))
  source = tiny.stored(UNEVEN, moments=None)
  target = _uneven((1, 3), 16, mlp_dim=12)
  grown = scale_up(source, target, options)
  for part, places in (("dense_mlp", chosen), ("mlp", [*range(10), 0, 1])):
    old, new = (
      np.asarray(model.params["layers"][part]["up_kernel"])
      for model in (source, grown)
    )
    np.testing.assert_array_equal(new, old[..., places])
  with pytest.raises(UserError) as error:
    plan_growth(DENSE, tiny.replace(DENSE, mlp_dim=12), options)
  assert str(error.value).startswith(
    f"config.init.maps={str(file)!r}: axis='dense_mlp' is unknown; "
  )


def test_depth_copies_layers_with_what_they_have_also_from_disk(tmp_path):
  source, target = _stored(MIXED), _mixed((2, 3, 6, 7), num_layers=8)
  options = ScaleUp(source="s", method="fpi", depth="interpolate")
  grown = scale_up(source, target, options)
  assert grown.moments is not None
  for before, after in (
    (source.params, grown.params),
    (source.ema, grown.ema),
    (tiny.params(MIXED), grown.moments.mu),
  ):
    for layer in range(8):
      _assert_same(
        _layer(after, layer, target.moe_layers),
        _layer(before, layer // 2, MIXED.moe_layers),
      )
  axes = decoder_lm.parameter_axes(MIXED)
  model_dir.save_model(tmp_path / "source", source, axes=axes)
  reader = model_dir.open_model(
    tmp_path / "source", like=decoder_lm.abstract_params
  )
  stream_scale_up(
    reader, tmp_path / "grown", target, options, progress=lambda _: None
  )
  found = model_dir.load_model(
    tmp_path / "grown", like=decoder_lm.abstract_params
  )
  assert found.config == target
  _assert_same(
    (found.params, found.moments, found.ema),
    (grown.params, grown.moments, grown.ema),
  )


def test_a_pattern_fits_where_the_rule_keeps_it():
  """1, 3, 5, 7 are copies of 1, 3, 1, 3 by stacking."""
  target = _mixed("every_second", num_layers=8)
  options = ScaleUp(source="s", method="fpi", depth="stack")
  assert make_growth(MIXED, target, options).keeps_layers is False


def test_aki_takes_the_next_layer_of_the_same_kind():
  target = tiny.replace(MIXED, mlp_dim=12)
  source = tiny.stored(MIXED, moments=None)
  grown = scale_up(source, target, ScaleUp(source="s", method="aki"))
  before, after = source.params["layers"], grown.params["layers"]
  # 10 neurons and two that are copies of the first; these take other values in
  # all layers but the last of a kind.
  for part in ("mlp", "dense_mlp"):
    old, new = (np.asarray(tree[part]["up_kernel"]) for tree in (before, after))
    np.testing.assert_array_equal(new[..., :10], old)
    np.testing.assert_array_equal(new[0, ..., 10:], old[1, ..., :2])
    np.testing.assert_array_equal(new[1, ..., 10:], old[1, ..., :2])


def test_a_mask_of_zero_hides_new_layers_of_either_kind():
  source = tiny.stored(MIXED, moments=None)
  target = _mixed((2, 3, 6, 7), num_layers=8, mlp_dim=12)
  grown = scale_up(source, target, ScaleUp(source="s", method="msg"))
  before = tiny.logits(MIXED, source.params)
  after = tiny.logits(grown.config, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()


@pytest.mark.parametrize("model", [MIXED, UNEVEN], ids=["even", "uneven"])
def test_the_streamed_forward_is_the_decoders(model):
  params = tiny.params(model)
  found = checking.logits(
    checking.ReadModel(config=model, params=ArrayTree(params)), tiny.TOKENS
  )
  expected = tiny.logits(model, params)
  assert np.abs(found[0] - expected).max() < EXACT * np.abs(expected).max()


def test_a_learned_operator_starts_as_fpi():
  target = _mixed((2, 3, 6, 7), num_layers=8, **WIDE)
  options = ScaleUp(source="s", method="fpi", depth="interpolate")
  source = tiny.stored(MIXED, moments=None)
  expected = scale_up(source, target, options).params
  axes = decoder_lm.parameter_axes(MIXED)
  operator = ligo.init_operator(
    {
      "embed": axis_map.circular(8, 16),
      "mlp": axis_map.circular(10, 20),
      "dense_mlp": axis_map.circular(10, 20),
    },
    depth.interpolate(4, 8).copies,
    axes,
    dtype=jnp.float64,
  )
  apply = jax.jit(lambda *both: ligo.apply_operator(both[0], both[1], axes))
  found = apply(operator, source.params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-15),
    found,
    expected,
  )


@pytest.mark.parametrize(
  ("target", "message"),
  [
    (
      _mixed("every_second", num_layers=8),
      "config.model.moe.layers='every_second': layer 1 has experts and copies"
      " layer 0 of the source, which has a dense FFN; expected (2, 3, 6, 7),"
      " the layers that copy experts (interpolate)",
    ),
    (
      _mixed((2, 6, 7), num_layers=8),
      "config.model.moe.layers=(2, 6, 7): layer 3 has a dense FFN and copies"
      " layer 1 of the source, which has experts; expected (2, 3, 6, 7), the"
      " layers that copy experts (interpolate)",
    ),
    (
      _mixed("all"),
      "config.model.moe.layers='all': layer 0 has experts and copies layer 0 of"
      " the source, which has a dense FFN; expected (1, 3), the layers that"
      " copy experts (interpolate)",
    ),
  ],
  ids=["pattern", "list", "all"],
)
def test_layers_of_another_kind_are_refused_by_number(target, message):
  source = tiny.stored(MIXED, moments=None)
  with pytest.raises(UserError) as error:
    scale_up(source, target, ScaleUp(source="s", method="fpi"))
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("source", "target", "method", "message"),
  [
    (
      UNEVEN,
      _uneven("every_second", 12),
      "fpi",
      "config.model.moe.dense_mlp_dim=12: expected at least 14; Scale-Up does"
      " not shrink",
    ),
    (
      UNEVEN,
      _mixed("every_second", mlp_dim=12),
      "fpi",
      "config.model.moe.dense_mlp_dim=None: expected at least 14; Scale-Up does"
      " not shrink",
    ),
    (
      UNEVEN,
      _uneven("every_second", 20),
      "hypercloning",
      "config.model.moe.dense_mlp_dim: dense_mlp grows from 14 to 20; expected"
      " a multiple, as 14 or 28; method='hypercloning' copies everything"
      " equally often, method='lemon' is exact at any size",
    ),
    (
      UNEVEN,
      _uneven("every_second", 28),
      "msg",
      "the source's moe.dense_mlp_dim=14: expected 10, the mlp_dim; a growth"
      " mask is the same for FFNs and experts",
    ),
    (
      MIXED,
      _uneven("every_second", 28, mlp_dim=20),
      "msg",
      "config.model.moe.dense_mlp_dim=28: expected 20, the mlp_dim; a growth"
      " mask is the same for FFNs and experts",
    ),
  ],
  ids=["shrinks", "shrinks by mlp_dim", "no copies", "masked", "to be masked"],
)
def test_widths_of_ffns_that_cannot_be_are_refused(
  source, target, method, message
):
  with pytest.raises(UserError) as error:
    plan_growth(source, target, ScaleUp(source="s", method=method))
  assert str(error.value) == message


def test_scale_out_into_some_layers_keeps_the_function(tmp_path):
  source, target = _stored(DENSE), _mixed((1, 2))
  grown = scale_out(source, target, ScaleOut(source="s"), seed=5)
  before = tiny.logits(DENSE, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()
  assert grown.moments is not None and grown.ema is not None
  assert source.ema is not None
  old = tiny.params(DENSE)
  # 4 experts of which a token meets 2.
  for found, expected, divisor in (
    (grown.params, old, 1),
    (grown.ema, source.ema, 1),
    (grown.moments.mu, old, 4),
    (grown.moments.nu, jax.tree.map(jnp.square, old), 8),
  ):
    for name in ("gate_kernel", "up_kernel", "down_kernel"):
      ffns = np.asarray(expected["layers"]["mlp"][name])
      stack = found["layers"]
      np.testing.assert_array_equal(stack["dense_mlp"][name], ffns[[0, 3]])
      for row, layer in enumerate((1, 2)):
        for expert in stack["mlp"][name][row]:
          np.testing.assert_array_equal(expert, ffns[layer] / divisor)
  assert grown.params["layers"]["mlp"]["router"]["kernel"].shape == (2, 8, 4)
  _assert_streamed(source, target, ScaleOut(source="s"), grown, tmp_path)


def _assert_streamed(source, target, options, grown, folder):
  """From disk to disk it is the same."""
  axes = decoder_lm.parameter_axes(source.config)
  model_dir.save_model(folder / "source", source, axes=axes)
  reader = model_dir.open_model(
    folder / "source", like=decoder_lm.abstract_params
  )
  plan = plan_scale_out(source.config, target, options)
  calibration = calibrate(
    plan.way,
    checking.ReadModel(config=source.config, params=reader.params),
    target,
    options,
    sample=SAMPLE,
    seed=5,
    path="target",
  )
  stream_scale_out(
    [reader],
    folder / "grown",
    plan,
    options,
    calibration=calibration,
    seed=5,
    progress=lambda _: None,
  )
  stored = model_dir.load_model(
    folder / "grown", like=decoder_lm.abstract_params
  )
  _assert_same(
    (stored.params, stored.moments, stored.ema),
    (grown.params, grown.moments, grown.ema),
  )


def test_a_mixed_model_takes_more_experts_in_its_layers(tmp_path):
  source = _stored(MIXED)
  larger = dataclasses.replace(tiny.MOE, layers=(1, 3), num_experts=8, top_k=4)
  target, options = tiny.replace(DENSE, moe=larger), ScaleOut(source="s")
  grown = scale_out(source, target, options, seed=5)
  before = tiny.logits(MIXED, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()
  _assert_streamed(source, target, options, grown, tmp_path)


def test_experts_of_some_layers_merge_into_the_ffns_they_are_copies_of(
  tmp_path,
):
  dense = _stored(DENSE)
  mixture = scale_out(dense, _mixed((1, 2)), ScaleOut(source="s"), seed=5)
  for method in ("average", "merge_by_usage"):
    options = ScaleOut(source="s", method=method, optimizer="reset")
    merged = scale_out(mixture, DENSE, options, sample=SAMPLE, seed=5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-15),
      merged.params,
      dense.params,
    )
    (tmp_path / method).mkdir()
    mixture = dataclasses.replace(mixture, moments=None)
    _assert_streamed(mixture, DENSE, options, merged, tmp_path / method)


def test_what_is_measured_is_of_the_layers_that_get_experts(tmp_path):
  """The constants and rows of a uniform mixture, of these layers."""
  kind: dict[str, Any] = dict(
    router_order="softmax_then_topk", renormalise=False, num_experts=2
  )
  options = ScaleOut(source="s", router="clusters", optimizer="reset")
  source = dataclasses.replace(_stored(DENSE), moments=None)
  found = {}
  for layers in ("all", (1, 3)):
    moe = dataclasses.replace(tiny.MOE, layers=layers, **kind)
    target = tiny.replace(DENSE, moe=moe)
    grown = scale_out(source, target, options, sample=SAMPLE, seed=5)
    growth = grown.lineage.events[-1].growth
    assert growth is not None
    router = np.asarray(grown.params["layers"]["mlp"]["router"]["kernel"])
    found[layers] = np.asarray(growth["constants"]["values"]), router
  for whole, some in zip(found["all"], found[1, 3], strict=True):
    np.testing.assert_array_equal(some, whole[[1, 3]])
  _assert_streamed(source, target, options, grown, tmp_path)


# 4 copies of each half, or 4 of what a shared expert leaves, of which a token
# meets two; layers 0 and 2 keep 10 hidden units.
CUT: dict[str, dict[str, Any]] = {
  "shards": dict(num_experts=8, top_k=4, dense_mlp_dim=10),
  "shared part": dict(dense_mlp_dim=10, shared_expert_dim=5),
  "shared part without a gate": dict(
    dense_mlp_dim=10, shared_expert_dim=5, shared_expert_gate=False
  ),
}


def _cut(name: str):
  moe = dataclasses.replace(tiny.MOE, layers="every_second", **CUT[name])
  return tiny.replace(DENSE, moe=moe, mlp_dim=5)


def _cutting(name: str) -> ScaleOut:
  method = "granular" if name == "shards" else "sparse_upcycling"
  return ScaleOut(source="s", method=method)


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("name", CUT)
def test_layers_without_experts_keep_an_ffn_that_others_cut(name, tmp_path):
  source, target = _stored(DENSE), _cut(name)
  assert plan_scale_out(DENSE, target, _cutting(name)).exactness.exact
  grown = scale_out(source, target, _cutting(name), seed=5)
  before = tiny.logits(DENSE, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()
  stack = grown.params["layers"]
  for kernel in ("gate_kernel", "up_kernel", "down_kernel"):
    ffns = np.asarray(source.params["layers"]["mlp"][kernel])
    np.testing.assert_array_equal(stack["dense_mlp"][kernel], ffns[[0, 2]])
  _assert_streamed(source, target, _cutting(name), grown, tmp_path)


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("name", ["shards", "shared part"])
def test_a_larger_mixture_keeps_ffns_of_another_width(name, tmp_path):
  source = _stored(_cut(name))
  old = source.config.moe
  assert old is not None
  moe = dataclasses.replace(
    old, num_experts=2 * old.num_experts, top_k=2 * old.top_k
  )
  target, options = tiny.replace(source.config, moe=moe), ScaleOut(source="s")
  grown = scale_out(source, target, options, seed=5)
  before = tiny.logits(source.config, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()
  _assert_streamed(source, target, options, grown, tmp_path)


def test_a_mixed_mixture_is_cut_beside_the_ffns_it_keeps():
  """Experts of 10 units in halves; None was the width of both."""
  moe = dataclasses.replace(tiny.MOE, layers=(1, 3), **CUT["shards"])
  target = tiny.replace(DENSE, moe=moe, mlp_dim=5)
  options = ScaleOut(source="s", method="granular")
  source = tiny.stored(MIXED, moments=None)
  grown = scale_out(source, target, options, seed=5)
  before = tiny.logits(MIXED, source.params)
  after = tiny.logits(target, grown.params)
  assert np.abs(after - before).max() < EXACT * np.abs(before).max()


def test_shared_halves_and_means_merge_into_the_ffns_they_are_copies_of():
  target = _cut("shared part without a gate")
  dense = tiny.stored(DENSE, moments=None)
  mixture = scale_out(dense, target, ScaleOut(source="s"), seed=5)
  options = ScaleOut(source="s", method="average", optimizer="reset")
  merged = scale_out(mixture, DENSE, options, seed=5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-15),
    merged.params,
    dense.params,
  )


KEPT = (
  ": expected 10, the hidden units of the FFNs that layers without experts keep"
  " (moe.layers=(1, 2))"
)


@pytest.mark.parametrize(
  ("source", "target", "method", "message"),
  [
    (
      DENSE,
      _mixed((1, 2), mlp_dim=5),
      "granular",
      f"config.model.moe.dense_mlp_dim=None{KEPT}",
    ),
    (
      DENSE,
      _uneven((1, 2), 20),
      "sparse_upcycling",
      f"config.model.moe.dense_mlp_dim=20{KEPT}",
    ),
    (
      _mixed((1, 2)),
      _uneven((1, 2), 20),
      "sparse_upcycling",
      f"config.model.moe.dense_mlp_dim=20{KEPT}",
    ),
    (
      UNEVEN,
      DENSE,
      "average",
      "config.init.method='average': the source's layers without experts have"
      " 14 hidden units (moe.dense_mlp_dim); expected 10, those of a merged"
      " FFN, since all layers of a dense model have as many",
    ),
  ],
  ids=["cut", "wider", "wider beside experts", "merged"],
)
def test_an_ffn_that_is_kept_is_as_wide_as_it_was(
  source, target, method, message
):
  options = ScaleOut(
    source="s",
    method=method,
    optimizer="reset" if method == "average" else "grow",
  )
  with pytest.raises(UserError) as error:
    plan_scale_out(source, target, options)
  assert str(error.value) == message
