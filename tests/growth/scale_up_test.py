"""Scale-Up: what is exact, what is not, and every element of AKI."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
)
from aquila_jax.growth import scale_up as scale_up_lib
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.models import decoder_lm
from tests.growth import growing, tiny


def _options(**fields) -> ScaleUp:
  defaults: dict[str, Any] = dict(source="dense", method="fpi")
  return ScaleUp(**(defaults | fields))


SHARED = dataclasses.replace(tiny.MOE, shared_expert_dim=5)

# SOURCE has D=8, F=10, 2 groups of 3 query heads.
SIZES = {
  "width x2": dict(embed_dim=16),
  "width x3": dict(embed_dim=24),
  "FFN to any size": dict(mlp_dim=17),
  "heads in their groups": dict(num_heads=10),
  "whole groups": dict(num_kv_heads=4, num_heads=12),
  "groups, not a multiple": dict(num_kv_heads=3, num_heads=15),
  "all": dict(embed_dim=24, mlp_dim=33, num_kv_heads=4, num_heads=20),
}


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("moe", [None, tiny.MOE])
def test_fpi_is_exact_in_every_direction_together(tied, bias, moe):
  config = tiny.replace(
    tiny.SOURCE, tied_embeddings=tied, qkv_bias=bias, moe=moe
  )
  target = tiny.replace(config, **SIZES["all"])
  assert growing.difference(config, target, _options()) < growing.EXACT


OPTIONS = {
  "qk_norm": dict(qk_norm=True),
  "out bias": dict(out_bias=True),
  "window": dict(sliding_window=4),
  "linear": dict(rope_scaling=LinearRopeScaling(factor=3.0)),
  # Base 100 and H=4: of 40 tokens, wavelengths of 2 pi and 20 pi are kept and
  # divided.
  "llama3": dict(
    rope_scaling=Llama3RopeScaling(factor=3.0, original_context_length=40)
  ),
  "shared expert": dict(moe=SHARED),
  "all, tied": dict(
    qk_norm=True,
    out_bias=True,
    sliding_window=4,
    rope_scaling=LinearRopeScaling(factor=3.0),
    moe=SHARED,
    tied_embeddings=True,
  ),
}


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("name", OPTIONS)
def test_fpi_is_exact_with_options_of_the_model(name):
  config = tiny.replace(tiny.SOURCE, **OPTIONS[name])
  target = tiny.replace(config, **SIZES["all"])
  assert growing.difference(config, target, _options()) < growing.EXACT


def test_leaves_of_options_grow_by_their_axes():
  config = tiny.replace(tiny.SOURCE, **OPTIONS["all, tied"])
  target = tiny.replace(config, **SIZES["all"])
  source = tiny.stored(config, moments=None)
  grown = tiny.arrays(scale_up(source, target, _options()).params)
  params = tiny.arrays(source.params)
  prefix = "layers/attention/"
  # Heads keep their width; an output's bias is written three times.
  for name in ("query_norm/scale", "key_norm/scale"):
    assert np.array_equal(grown[prefix + name], params[prefix + name])
  assert np.array_equal(
    grown[prefix + "out_bias"], np.tile(params[prefix + "out_bias"], (1, 3))
  )
  # The shared expert keeps its hidden width. What reads D is divided by 3.
  shared = "layers/mlp/shared/"
  for name in ("gate_kernel", "up_kernel", "token_gate_kernel"):
    np.testing.assert_allclose(
      grown[shared + name],
      np.tile(params[shared + name], (1, 3, 1)) / 3,
      rtol=1e-15,
    )
  assert np.array_equal(
    grown[shared + "down_kernel"],
    np.tile(params[shared + "down_kernel"], (1, 1, 3)),
  )


@pytest.mark.parametrize("name", SIZES)
def test_fpi_is_exact_in_each_direction(name):
  target = tiny.replace(tiny.SOURCE, **SIZES[name])
  assert growing.difference(tiny.SOURCE, target, _options()) < growing.EXACT


@pytest.mark.parametrize(
  "name", ["FFN to any size", "heads in their groups", "whole groups"]
)
def test_random_maps_are_exact_outside_the_residual(name):
  target = tiny.replace(tiny.SOURCE, **SIZES[name])
  options = _options(width_map="random")
  assert growing.difference(tiny.SOURCE, target, options) < growing.EXACT


@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    # Under RMSNorm, counts of 2 and 1 weigh the mean square unevenly.
    (dict(embed_dim=10), _options()),
    (dict(embed_dim=16), _options(width_map="random")),
    (dict(num_layers=4), _options(depth="interpolate")),
    (dict(num_layers=4), _options(depth="stack")),
    (dict(embed_dim=16), _options(method="aki")),
    (dict(embed_dim=16), _options(method="aki_pro")),
  ],
)
def test_what_is_not_exact_is_known(sizes, options):
  target = tiny.replace(tiny.SOURCE, **sizes)
  assert growing.difference(tiny.SOURCE, target, options) > 1e-3


def test_float32_is_exact_to_rounding():
  single = dict(param_dtype="float32", compute_dtype="float32")
  config = tiny.replace(tiny.SOURCE, **single)
  target = tiny.replace(config, **SIZES["all"])
  # 2^-23 times sums of some hundred terms.
  assert growing.difference(config, target, _options()) < 1e-5


# Every leaf of a layer: what its dimensions after `layer` read and write.
LAYER_LEAVES = {
  "attention/query_kernel": "r:embed w:kv_head w:q_per_kv w:head_dim",
  "attention/query_bias": "w:kv_head w:q_per_kv w:head_dim",
  "attention/key_kernel": "r:embed w:kv_head w:head_dim",
  "attention/key_bias": "w:kv_head w:head_dim",
  "attention/value_kernel": "r:embed w:kv_head w:head_dim",
  "attention/value_bias": "w:kv_head w:head_dim",
  "attention/out_kernel": "r:kv_head r:q_per_kv r:head_dim w:embed",
  "attention_norm/scale": "w:embed",
  "mlp/gate_kernel": "r:embed w:mlp",
  "mlp/up_kernel": "r:embed w:mlp",
  "mlp/down_kernel": "r:mlp w:embed",
  "mlp_norm/scale": "w:embed",
}
AKI_TARGET = dict(embed_dim=12, mlp_dim=15, num_kv_heads=3, num_heads=12)
OLD = dict(embed=8, mlp=10, kv_head=2, q_per_kv=3, head_dim=4)
NEW = dict(embed=12, mlp=15, kv_head=3, q_per_kv=4, head_dim=4)


def _copies(axis: str, index: int) -> int:
  """C of a circular map, counted."""
  return sum(i % OLD[axis] == index % OLD[axis] for i in range(NEW[axis]))


@pytest.mark.parametrize("residual", ["next_layer", "own_layer"])
@pytest.mark.parametrize("method", ["fpi", "aki"])
def test_every_element_of_a_layer_by_the_formula(method, residual):
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, **AKI_TARGET)
  options = _options(method=method, aki_residual=residual)
  grown = tiny.arrays(scale_up(source, target, options).params)
  params = tiny.arrays(source.params)
  for name, words in LAYER_LEAVES.items():
    axes = [word.split(":") for word in words.split()]
    before, after = params[f"layers/{name}"], grown[f"layers/{name}"]
    assert after.shape == (3, *(NEW[axis] for _, axis in axes)), name
    expected = np.zeros_like(after)
    for index in itertools.product(*map(range, after.shape)):
      layer, place = index[0], index[1:]
      from_next = method == "aki" and any(
        role == "w"
        and i >= OLD[axis]
        and not (axis == "embed" and residual == "own_layer")
        for i, (role, axis) in zip(place, axes, strict=True)
      )
      if from_next and layer < 2:
        layer += 1
      value = before[
        (layer, *(i % OLD[a] for i, (_, a) in zip(place, axes, strict=True)))
      ]
      for i, (role, axis) in zip(place, axes, strict=True):
        if role == "r":
          value /= _copies(axis, i)
      expected[index] = value
    np.testing.assert_allclose(after, expected, rtol=1e-14, err_msg=name)


@pytest.mark.parametrize("method", ["fpi", "aki"])
def test_what_lies_outside_the_layers_grows_by_fpi(method):
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, embed_dim=12)
  options = _options(method=method)
  grown = tiny.arrays(scale_up(source, target, options).params)
  params = tiny.arrays(source.params)
  places = np.arange(12) % 8
  counts = np.array([2, 2, 2, 2, 1, 1, 1, 1])[places]
  table, head = grown["embedding/table"], grown["lm_head/kernel"]
  assert np.array_equal(table, params["embedding/table"][:, places])
  assert np.array_equal(
    grown["final_norm/scale"], params["final_norm/scale"][places]
  )
  assert np.array_equal(
    head, params["lm_head/kernel"][places] / counts[:, None]
  )


def test_the_norm_before_a_tied_head_is_divided_in_its_stead():
  config = tiny.replace(tiny.SOURCE, tied_embeddings=True)
  source = tiny.stored(config, moments=None)
  target = tiny.replace(config, embed_dim=16)
  grown = tiny.arrays(scale_up(source, target, _options()).params)
  scale = np.asarray(source.params["final_norm"]["scale"])
  assert np.array_equal(grown["final_norm/scale"], np.tile(scale, 2) / 2)


@pytest.mark.parametrize("rule", ["interpolate", "stack"])
@pytest.mark.parametrize("method", ["fpi", "aki"])
def test_width_comes_before_depth(rule, method):
  source = tiny.stored(tiny.SOURCE, moments=None)
  wide = tiny.replace(tiny.SOURCE, embed_dim=16)
  both = tiny.replace(wide, num_layers=5)
  options = _options(method=method, depth=rule)
  step1 = scale_up(source, wide, options)
  step2 = scale_up(step1, both, _options(depth=rule))
  at_once = scale_up(source, both, options)
  jax.tree.map(np.testing.assert_array_equal, step2.params, at_once.params)
  if rule == "interpolate":  # 0 0 1 1 2: both copies are equal
    kernel = np.asarray(at_once.params["layers"]["mlp"]["up_kernel"])
    assert np.array_equal(kernel[0], kernel[1])
    assert not np.array_equal(kernel[1], kernel[2])


def test_aki_pro_is_aki_with_interpolation():
  source = tiny.stored(tiny.SOURCE)
  target = tiny.replace(tiny.SOURCE, num_layers=4, num_heads=10, embed_dim=16)
  aki_pro = scale_up(source, target, _options(method="aki_pro"))
  aki = scale_up(source, target, _options(method="aki", depth="interpolate"))
  jax.tree.map(np.testing.assert_array_equal, aki_pro.params, aki.params)
  jax.tree.map(np.testing.assert_array_equal, aki_pro.moments, aki.moments)


def test_random_is_the_targets_own_initialisation():
  source = tiny.stored(tiny.SOURCE)
  target = tiny.replace(
    tiny.SOURCE, embed_dim=16, param_dtype="float32", qkv_bias=True
  )
  options = _options(method="random", optimizer="reset")
  grown = scale_up(source, target, options, seed=5)
  expected = jax.jit(functools.partial(decoder_lm.init_params, target))(
    key=jax.random.key(5)
  )
  jax.tree.map(np.testing.assert_array_equal, grown.params, expected)
  assert grown.moments is None
  assert grown.tokenizer == source.tokenizer
  with pytest.raises(errors.UserError) as caught:
    scale_up(source, target, _options(method="random"))
  assert str(caught.value) == (
    "config.init.optimizer='grow': expected 'reset'; method='random' keeps no"
    " parameter that moments could belong to"
  )


def test_the_lineage_says_what_was_done_and_what_is_new():
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(
    tiny.SOURCE, embed_dim=16, num_layers=5, num_heads=10, mlp_dim=10
  )
  grown = scale_up(
    source, target, _options(method="aki_pro"), seed=3, name="wide"
  )
  first, event = grown.lineage.events
  assert first == source.lineage.events[0]
  assert (event.kind, event.name, event.parent) == ("scale_up", "wide", "dense")
  assert event.options["method"] == "aki_pro"
  assert event.options["seed"] == 3
  # Layers 0 0 1 1 2; D 8 -> 16; 3 -> 5 heads a group.
  assert event.new_indices == {
    "layer": [[1, 2], [3, 4]],
    "embed": [[8, 16]],
    "q_per_kv": [[3, 5]],
  }
  assert grown.lineage.new_indices == event.new_indices


def test_the_average_grows_as_the_parameters_do():
  source = tiny.stored(tiny.SOURCE, moments=None)
  other = tiny.params(tiny.SOURCE, seed=9)
  source = dataclasses.replace(source, ema=other)
  target = tiny.replace(tiny.SOURCE, embed_dim=16, mlp_dim=15)
  grown = scale_up(source, target, _options())
  alone = scale_up(
    dataclasses.replace(source, params=other), target, _options()
  )
  jax.tree.map(np.testing.assert_array_equal, grown.ema, alone.params)


def test_the_target_decides_the_parameter_dtype():
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, embed_dim=16, param_dtype="float32")
  grown = scale_up(source, target, _options())
  assert {x.dtype for x in jax.tree.leaves(grown.params)} == {
    jnp.dtype("float32")
  }


def test_the_source_is_left_alone():
  source = tiny.stored(tiny.SOURCE)
  before = jax.tree.map(np.array, source.params)
  scale_up(source, tiny.replace(tiny.SOURCE, embed_dim=16), _options())
  jax.tree.map(np.testing.assert_array_equal, source.params, before)


@pytest.mark.parametrize(
  ("fields", "options", "message"),
  [
    (
      dict(head_dim=8),
      {},
      "config.model.head_dim=8: expected the source's 4; RoPE turns each pair"
      " of a head at a rate of its own, so heads grow in number, not in width",
    ),
    (
      dict(embed_dim=6),
      {},
      "config.model.embed_dim=6: expected at least 8; Scale-Up does not shrink",
    ),
    (
      dict(num_layers=2),
      {},
      "config.model.num_layers=2: expected at least 3; Scale-Up does not"
      " shrink",
    ),
    (
      dict(num_heads=4),
      {},
      "config.model.num_heads=4: expected at least 6; Scale-Up does not shrink"
      " a group of 3 heads",
    ),
    (
      dict(num_kv_heads=3),
      {},
      "config.model.num_heads=6: expected at least 9; Scale-Up does not shrink"
      " a group of 3 heads",
    ),
    (
      dict(num_kv_heads=4, num_heads=12),
      dict(method="aki_pro"),
      "config.model.num_kv_heads=4: expected the source's 2; method='aki_pro'"
      " keeps the key/value groups and grows query heads inside them,"
      " method='aki' or 'fpi' can add groups",
    ),
    (
      dict(vocab_size=20),
      {},
      "config.model.vocab_size=20: expected the source's 13; the tokenizer"
      " stays; init.vocabulary='mean' adds rows",
    ),
    (
      dict(tied_embeddings=True),
      {},
      "config.model.tied_embeddings=True: expected the source's False; growth"
      " adds no leaves",
    ),
    (
      dict(rope_theta=5.0),
      dict(method="random", optimizer="reset"),
      "config.model.rope_theta=5.0: expected the source's 100.0; another base"
      " turns every head; init.context='extend' allows it",
    ),
  ],
)
def test_a_pair_that_does_not_fit_is_refused(fields, options, message):
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, **fields)
  with pytest.raises(errors.UserError) as caught:
    scale_up(source, target, _options(**options))
  assert str(caught.value) == message


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      dict(rope_scaling=LinearRopeScaling(factor=2.0)),
      "config.model.rope_scaling={'kind': 'linear', 'factor': 2.0}: expected"
      " the source's None; another scaling turns every head;"
      " init.context='extend' allows it",
    ),
    (
      dict(sliding_window=5),
      "config.model.sliding_window=5: expected the source's None; another"
      " window sees other keys",
    ),
    (
      dict(out_bias=True),
      "config.model.out_bias=True: expected the source's False; growth adds no"
      " leaves",
    ),
    (
      dict(qk_norm=True),
      "config.model.qk_norm=True: expected the source's False; growth adds no"
      " leaves",
    ),
  ],
)
def test_options_of_the_source_are_kept(fields, message):
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, embed_dim=16, **fields)
  with pytest.raises(errors.UserError) as caught:
    scale_up(source, target, _options())
  assert str(caught.value) == message


def test_stop_tokens_and_chat_template_are_kept():
  source = tiny.stored(
    tiny.SOURCE,
    moments=None,
    tokenizer=None,
    stop_tokens=(3, 5),
    chat_template="{{ x }}",
  )
  target = tiny.replace(tiny.SOURCE, embed_dim=16)
  grown = scale_up(source, target, _options())
  assert grown.tokenizer is None
  assert grown.stop_tokens == (3, 5)
  assert grown.chat_template == "{{ x }}"


def test_experts_are_refused_by_name():
  source = tiny.stored(tiny.SOURCE, moments=None)
  target = tiny.replace(tiny.SOURCE, moe=tiny.MOE)
  with pytest.raises(errors.UserError) as caught:
    scale_up(source, target, _options())
  assert str(caught.value) == (
    "config.model.moe=(4 experts): expected the source's None; Scale-Out makes"
    " experts"
  )
  source = tiny.stored(target, moments=None)
  assert target.moe is not None
  other = dataclasses.replace(target.moe, top_k=3)
  with pytest.raises(errors.UserError) as caught:
    scale_up(source, tiny.replace(target, moe=other), _options())
  assert str(caught.value) == (
    "config.model.moe.top_k=3: expected the source's 2; Scale-Out makes experts"
  )


def test_the_papers_pair_grows_in_shape():
  """7B to 16B, 32/8 heads to 40/8: by shapes, without allocating."""
  small = tiny.replace(
    tiny.SOURCE,
    num_layers=32,
    embed_dim=4096,
    mlp_dim=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    param_dtype="float32",
  )
  large = tiny.replace(
    small, num_layers=40, embed_dim=5120, mlp_dim=20480, num_heads=40
  )
  growth = scale_up_lib.make_growth(
    small, large, _options(method="aki_pro"), path="config.model"
  )
  before = scale_up_lib.model_leaves(small)
  for name, leaf in scale_up_lib.model_leaves(large).items():
    for axis, old, new in zip(
      leaf.axes.axes, before[name].shape, leaf.shape, strict=True
    ):
      g = growth.maps.get(axis.name)
      assert (old, new) == ((g.source_size, g.target_size) if g else (old, old))
