"""The operator: FPI at first, and every leaf by an einsum of its own."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from aquila_jax.core.axes import LeafAxes, neither, reads, writes
from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth import axis_map, depth, ligo
from aquila_jax.growth.scale_up import make_growth, scale_up
from aquila_jax.models import decoder_lm
from tests.growth import tiny

# D=8, F=10, 2 groups of 3 query heads, 3 layers; all of them grow.
GROWN: dict[str, Any] = dict(
  embed_dim=24, mlp_dim=33, num_kv_heads=4, num_heads=20, num_layers=5
)
DENSE = tiny.replace(tiny.SOURCE, qkv_bias=True)
SHARED = dataclasses.replace(tiny.MOE, shared_expert_dim=5)
MIXTURE = tiny.replace(
  tiny.SOURCE, moe=SHARED, tied_embeddings=True, qk_norm=True, out_bias=True
)

# Every leaf of the two: L layer, D embed, K kv_head, G q_per_kv, F mlp; a lower
# letter is the target's, and what has none stays. Written from the model, not
# from its declarations.
_PRODUCTS = {
  "embedding/table": "VD,wdD->Vd",
  "lm_head/kernel": "DV,rdD->dV",
  "layers/attention/query_kernel": "LDKGH,lL,rdD,wkK,wgG->ldkgH",
  "layers/attention/query_bias": "LKGH,lL,wkK,wgG->lkgH",
  "layers/attention/key_kernel": "LDKH,lL,rdD,wkK->ldkH",
  "layers/attention/key_bias": "LKH,lL,wkK->lkH",
  "layers/attention/value_kernel": "LDKH,lL,rdD,wkK->ldkH",
  "layers/attention/value_bias": "LKH,lL,wkK->lkH",
  "layers/attention/out_kernel": "LKGHD,lL,rkK,rgG,wdD->lkgHd",
  "layers/attention/out_bias": "LD,lL,wdD->ld",
  "layers/attention/query_norm/scale": "LH,lL->lH",
  "layers/attention/key_norm/scale": "LH,lL->lH",
  "layers/attention_norm/scale": "LD,lL,wdD->ld",
  "layers/mlp_norm/scale": "LD,lL,wdD->ld",
}
_DENSE_PRODUCTS = _PRODUCTS | {
  "final_norm/scale": "D,wdD->d",
  "layers/mlp/gate_kernel": "LDF,lL,rdD,wfF->ldf",
  "layers/mlp/up_kernel": "LDF,lL,rdD,wfF->ldf",
  "layers/mlp/down_kernel": "LFD,lL,rfF,wdD->lfd",
}
_MIXTURE_PRODUCTS = _PRODUCTS | {
  "final_norm/scale": "D,rdD->d",  # in front of a tied head
  "layers/mlp/router/kernel": "LDE,lL,rdD->ldE",
  "layers/mlp/gate_kernel": "LEDF,lL,rdD,wfF->lEdf",
  "layers/mlp/up_kernel": "LEDF,lL,rdD,wfF->lEdf",
  "layers/mlp/down_kernel": "LEFD,lL,rfF,wdD->lEfd",
  "layers/mlp/shared/gate_kernel": "LDS,lL,rdD->ldS",
  "layers/mlp/shared/up_kernel": "LDS,lL,rdD->ldS",
  "layers/mlp/shared/down_kernel": "LSD,lL,wdD->lSd",
  "layers/mlp/shared/token_gate_kernel": "LDS,lL,rdD->ldS",
}
_AXES = {"d": "embed", "k": "kv_head", "g": "q_per_kv", "f": "mlp"}


def _options(**fields) -> ScaleUp:
  defaults: dict[str, Any] = dict(source="s", method="fpi", optimizer="reset")
  return ScaleUp(**(defaults | fields))


def _operator(
  config: ModelConfig, target: ModelConfig, **fields
) -> ligo.Operator:
  growth = make_growth(config, target, _options(**fields))
  return ligo.init_operator(
    growth.width,
    growth.layers.copies,
    decoder_lm.parameter_axes(config),
    dtype=jnp.float64,
  )


@functools.cache
def _apply(config: ModelConfig):
  axes = decoder_lm.parameter_axes(config)
  return jax.jit(lambda op, params: ligo.apply_operator(op, params, axes))


def _randomised(operator: ligo.Operator) -> ligo.Operator:
  generator = np.random.default_rng(3)
  return jax.tree.map(
    lambda m: jnp.asarray(generator.standard_normal(m.shape)), operator
  )


def test_at_first_it_is_fpi():
  config = MIXTURE
  fields: dict[str, Any] = dict(width_map="random", depth="stack")
  target = tiny.replace(config, **GROWN)
  source = tiny.stored(config, moments=None)
  expected = tiny.arrays(scale_up(source, target, _options(**fields)).params)
  operator = _operator(config, target, **fields)
  grown = tiny.arrays(_apply(config)(operator, source.params))
  assert grown.keys() == expected.keys()
  for name, leaf in expected.items():
    # Sums with one term that is not zero. FPI divides by up to three counts
    # where this multiplies by their reciprocals: two roundings each.
    np.testing.assert_allclose(grown[name], leaf, rtol=6 * 2.0**-52, atol=0)


@pytest.mark.parametrize(
  ("config", "products"),
  [(DENSE, _DENSE_PRODUCTS), (MIXTURE, _MIXTURE_PRODUCTS)],
  ids=["dense", "mixture"],
)
def test_every_leaf_is_the_product_with_its_matrices(config, products):
  operator = _randomised(_operator(config, tiny.replace(config, **GROWN)))
  params = tiny.params(config)
  grown = tiny.arrays(_apply(config)(operator, params))
  source = tiny.arrays(params)
  for name, leaf in source.items():
    expected = _product(products[name], leaf, operator, name)
    # Sums of up to 3 * 2 * 3 * 8 terms in another order.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      grown[name], expected, rtol=0, atol=1e-13 * scale
    )


def _product(
  spec: str, leaf: np.ndarray, operator: ligo.Operator, name: str
) -> np.ndarray:
  """The einsum that _PRODUCTS says; w and r choose the matrix of an axis."""
  inputs, out = spec.split("->")
  subscripts, matrices = [], []
  for factor in inputs.split(",")[1:]:
    if factor == "lL":
      matrix = operator.depth[name]
    else:
      matrices_of = {"w": operator.writes, "r": operator.reads}[factor[0]]
      factor = factor[1:]
      matrix = matrices_of[_AXES[factor[0]]]
    subscripts.append(factor)
    matrices.append(np.asarray(matrix))
  letters = ",".join([inputs.split(",")[0], *subscripts])
  return np.einsum(f"{letters}->{out}", leaf, *matrices)


def test_its_gradients_are_those_of_finite_differences():
  axes = {
    "query": LeafAxes(
      (neither("layer"), reads("embed"), writes("kv_head"), writes("q_per_kv"))
    ),
    "out": LeafAxes(
      (neither("layer"), reads("kv_head"), reads("q_per_kv"), writes("embed"))
    ),
    "table": LeafAxes((neither("vocab"), writes("embed"))),
  }
  width = {
    "embed": axis_map.circular(3, 5),
    "kv_head": axis_map.circular(2, 3),
    "q_per_kv": axis_map.circular(2, 4),
  }
  layers = depth.interpolate(2, 3).copies
  operator = _randomised(
    ligo.init_operator(width, layers, axes, dtype=jnp.float64)
  )
  generator = np.random.default_rng(0)
  shapes = {"query": (2, 3, 2, 2), "out": (2, 2, 2, 3), "table": (7, 3)}
  params = {
    name: jnp.asarray(generator.standard_normal(shape))
    for name, shape in shapes.items()
  }

  @jax.jit
  def loss(operator, params):
    grown = ligo.apply_operator(operator, params, axes)
    # Not linear, so that a gradient that ignores where it is taken differs.
    return sum(jnp.mean(jnp.sin(leaf)) for leaf in jax.tree.leaves(grown))

  check_grads(loss, (operator, params), order=1, modes=["rev"])


def test_noise_splits_the_copies_and_keeps_the_function():
  # Everything that FPI grows exactly; F = 10 -> 13 leaves seven of one copy.
  sizes: dict[str, Any] = dict(
    embed_dim=24, mlp_dim=13, num_kv_heads=4, num_heads=20
  )
  config = tiny.replace(MIXTURE, moe=None)
  target = tiny.replace(config, **sizes)
  growth = make_growth(config, target, _options())
  before = _operator(config, target)
  operator = ligo.split_copies(
    before, growth.width, scale=0.5, key=jax.random.key(0)
  )
  params = tiny.params(config)
  expected = tiny.logits(config, params)
  grown = tiny.logits(target, _apply(config)(operator, params))
  scale = np.abs(expected).max()
  np.testing.assert_allclose(grown, expected, atol=1e-13 * scale)

  change = np.asarray(operator.reads["mlp"] - before.reads["mlp"])
  # Rows 0..2 have a second copy each, rows 10..12; 3..9 have none.
  assert np.array_equal(change[3:10], np.zeros((7, 10)))
  np.testing.assert_allclose(change[:3], -change[10:], atol=1e-16)
  # The norm of a row is 1/2, of its noise about half of the half.
  assert 0.02 < np.linalg.norm(change[0]) < 0.5
  jax.tree.map(np.testing.assert_array_equal, operator.writes, before.writes)


def test_no_noise_is_no_change():
  growth = make_growth(DENSE, tiny.replace(DENSE, **GROWN), _options())
  before = _operator(DENSE, tiny.replace(DENSE, **GROWN))
  after = ligo.split_copies(
    before, growth.width, scale=0.0, key=jax.random.key(0)
  )
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_what_does_not_grow_has_no_matrix():
  operator = _operator(DENSE, tiny.replace(DENSE, mlp_dim=17))
  assert list(operator.writes) == list(operator.reads) == ["mlp"]
  assert operator.depth == {}
  assert not operator.is_empty
  deeper = _operator(DENSE, tiny.replace(DENSE, num_layers=5))
  assert deeper.writes == deeper.reads == {}
  leaves = tiny.named(decoder_lm.parameter_axes(DENSE))
  assert deeper.depth.keys() == {
    name for name in leaves if name.startswith("layers/")
  }


def test_an_operator_of_nothing_leaves_everything_as_it_is():
  operator = _operator(DENSE, DENSE)
  assert operator.is_empty
  params = tiny.params(DENSE)
  grown = _apply(DENSE)(operator, params)
  jax.tree.map(np.testing.assert_array_equal, grown, params)


def test_half_precision_is_multiplied_in_float32():
  axes = {"kernel": LeafAxes((reads("embed"), writes("mlp")))}
  width = {
    "embed": axis_map.circular(7, 21),
    "mlp": axis_map.circular(5, 8),
  }
  layers = depth.interpolate(2, 2).copies
  operator = _randomised(ligo.init_operator(width, layers, axes))
  generator = np.random.default_rng(0)
  leaf = jnp.asarray(generator.standard_normal((7, 5)), jnp.bfloat16)
  grown = ligo.apply_operator(operator, {"kernel": leaf}, axes)["kernel"]
  assert grown.dtype == jnp.bfloat16
  exact = np.einsum(
    "dD,fF,DF->df",
    np.asarray(operator.reads["embed"], np.float64),
    np.asarray(operator.writes["mlp"], np.float64),
    np.asarray(leaf, np.float64),
  )
  # One rounding to bfloat16, at most 2^-8 of a value; sums of 35 in float32.
  np.testing.assert_allclose(
    np.asarray(grown, np.float64), exact, rtol=2.0**-8, atol=1e-5
  )


@pytest.mark.parametrize("name", ["head_dim", "vocab", "expert", "layer"])
def test_an_axis_that_must_stay_does_not_grow(name):
  width = {name: axis_map.circular(2, 4)}
  layers = depth.interpolate(1, 1).copies
  with pytest.raises(AssertionError, match=f"'{name}'"):
    ligo.init_operator(width, layers, {})


def test_an_axis_that_is_an_index_does_not_grow():
  axes = {"table": LeafAxes((neither("mlp"), writes("embed")))}
  width = {"mlp": axis_map.circular(2, 4)}
  with pytest.raises(AssertionError, match="mlp is indexed by"):
    ligo.init_operator(width, depth.interpolate(1, 1).copies, axes)


# (source, target) of embed, mlp and layer.
SIZES = [
  ((4, 8), (6, 9), (3, 5)),
  ((8, 16), (3, 4), (2, 6)),
  ((5, 6), (5, 40), (7, 8)),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_flops_are_those_of_the_cheapest_order(sizes):
  (d, d2), (f, f2), (l, l2) = sizes  # noqa: E741
  axes = {"kernel": LeafAxes((neither("layer"), reads("embed"), writes("mlp")))}
  width = {
    "embed": axis_map.circular(d, d2),
    "mlp": axis_map.circular(f, f2),
  }
  operator = ligo.init_operator(width, depth.interpolate(l, l2).copies, axes)
  shapes = {"kernel": jax.ShapeDtypeStruct((l, d, f), jnp.float32)}
  flops = ligo.operator_flops(operator, shapes, axes)

  def costs(order):
    done: list[int] = [l, d, f]
    grown, found = [l2, d2, f2], []
    for dim in order:
      found.append(2 * math.prod(done) * grown[dim])
      done[dim] = grown[dim]
    return found

  cheapest = min(map(costs, itertools.permutations(range(3))), key=sum)
  assert flops.forward == sum(cheapest)
  # Each product has a gradient in its matrix and, but for the first, one in
  # what it multiplies.
  assert flops.backward == 2 * sum(cheapest) - cheapest[0]
