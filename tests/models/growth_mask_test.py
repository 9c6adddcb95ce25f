"""A small model inside a larger one of which the mask hides the rest."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.axes import path_name
from aquila_jax.core.model_config import GrowthMask, ModelConfig, MoeConfig
from aquila_jax.models import decoder_lm
from aquila_jax.models.growth_mask import NO_MASKS, make_masks
from tests.growth.tiny import params

# 2 query heads in each of 2 groups become 3 in each of 3; layers 1 and 3 of the
# 5 are the old ones.
SMALL = ModelConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  mlp_dim=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  rope_theta=100.0,
  param_dtype="float64",
  compute_dtype="float64",
)
MASK = GrowthMask(
  embed_dim=8,
  mlp_dim=6,
  num_kv_heads=2,
  queries_per_kv=2,
  new_layers=(0, 2, 4),
)
GROWN: dict[str, Any] = dict(
  num_layers=5, embed_dim=12, mlp_dim=10, num_heads=9, num_kv_heads=3
)
MOE = MoeConfig(num_experts=4, top_k=2, block_size=4, shared_expert_dim=5)
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 0, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]])

# Each option with and without.
OPTIONS: list[dict[str, Any]] = [
  dict(qk_norm=True, qkv_bias=False),
  dict(tied_embeddings=True, out_bias=True, moe=MOE),
]


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def _large(small: ModelConfig, **fields) -> ModelConfig:
  return dataclasses.replace(small, **(GROWN | {"growth_mask": MASK} | fields))


def _blocks(small: ModelConfig):
  """Where each leaf of the small model lies in the large one's."""
  kept = [i for i in range(5) if i not in MASK.new_layers]

  def block(shape, axes):
    sizes = map(range, shape.shape)
    return np.ix_(
      *(
        kept if name == "layer" else size
        for name, size in zip(axes.names, sizes, strict=True)
      )
    )

  return jax.tree.map(
    block,
    decoder_lm.abstract_params(small),
    decoder_lm.parameter_axes(small),
  )


def _grown(small: ModelConfig):
  """Random parameters that have the small model's as their block."""
  without_mask = dataclasses.replace(_large(small), growth_mask=None)

  def insert(new, old, block):
    leaf = np.array(new)
    leaf[block] = old
    return leaf

  return jax.tree.map(
    insert, params(without_mask, seed=1), params(small), _blocks(small)
  )


def _new_parts(small: ModelConfig, gradient):
  """Zeros in place of the small model's part."""
  zero = jax.tree.map(np.zeros_like, params(small))

  def cut(leaf, zero, block):
    leaf = np.array(leaf)
    leaf[block] = zero
    return leaf

  return jax.tree.map(cut, gradient, zero, _blocks(small))


def _apply(config: ModelConfig, tree, value=None, *, listed=False, cache=None):
  row = [jnp.asarray(x, jnp.int32) for x in (TOKENS, POSITIONS, SEGMENTS)]
  return decoder_lm.DecoderLM(config, listed=listed).apply(
    {"params": tree},
    row[0],
    positions=row[1],
    segments=row[2],
    cache=cache,
    mask_value=value,
  )


@functools.cache
def _loss_and_gradient(config: ModelConfig):
  """Of a loss that meets every logit and every router; logits as well."""
  loss = _loss(config)
  return jax.jit(
    lambda tree, value=None: jax.value_and_grad(loss, has_aux=True)(tree, value)
  )


def _loss(config: ModelConfig):
  shape = (*TOKENS.shape, config.vocab_size)
  upstream = np.random.default_rng(0).standard_normal(shape)

  def loss(tree, value=None):
    out: Any = _apply(config, tree, value)
    total = jnp.sum(upstream * out.logits)
    if out.routing is not None:
      total += jnp.mean(out.routing.balance_loss + out.routing.z_loss)
    return total, out.logits

  return loss


def _close(a, b, *, tolerance: float = 1e-13):
  """Some 30 sums of up to 40 terms in a chain: 500 roundings of the largest."""

  def close(x, y):
    scale = max(1.0, float(np.max(np.abs(np.asarray(y)))))
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)

  jax.tree.map(close, a, b)


def _named(options: dict[str, Any]) -> str:
  return "-".join(name for name, value in options.items() if value)


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", OPTIONS, ids=_named)
def test_zero_is_the_small_model_and_one_is_no_mask(options):
  small = dataclasses.replace(SMALL, **options)
  large, tree, blocks = _large(small), _grown(small), _blocks(small)
  run = _loss_and_gradient(large)
  (loss, logits), gradient = _loss_and_gradient(small)(params(small))

  (found, found_logits), at_zero = run(tree, 0.0)
  _close((found, found_logits), (loss, logits))
  old = jax.tree.map(lambda g, i: np.array(g)[i], at_zero, blocks)
  _close(old, gradient)
  rest = jax.tree.leaves(_new_parts(small, at_zero))
  assert not any(np.any(leaf) for leaf in rest)

  unmasked = dataclasses.replace(large, growth_mask=None)
  _close(run(tree, 1.0)[0], jax.jit(_loss(unmasked))(tree))

  # Every leaf with a new part is taught as soon as that counts.
  new = jax.tree.leaves_with_path(_new_parts(small, run(tree, 0.3)[1]))
  for (path, leaf), old in zip(new, jax.tree.leaves(gradient), strict=True):
    assert np.all(np.isfinite(leaf))
    assert np.any(leaf) == (leaf.shape != old.shape), path_name(path)
  # Smooth at 0: twice the step is twice the change.
  once, twice = (
    np.array(run(tree, value)[0][1]) - np.array(logits)
    for value in (1e-5, 2e-5)
  )
  assert np.max(np.abs(once)) > 1e-6
  np.testing.assert_allclose(twice, 2 * once, rtol=0.01, atol=1e-7)


def test_every_way_through_the_layers_is_masked_alike():
  """Scanned or listed, in a cache, recomputed; by the config or the caller."""
  # float32: a cache counts its slots in int32.
  dtypes: Any = dict(param_dtype="float32", compute_dtype="float32")
  small = dataclasses.replace(SMALL, **OPTIONS[0], **dtypes)
  config = _large(small, growth_mask=dataclasses.replace(MASK, value=0.3))
  tree = _grown(small)
  (_, logits), gradient = _loss_and_gradient(_large(small))(tree, 0.3)
  cache = decoder_lm.make_cache(config, batch_size=2, num_slots=9)
  listed = decoder_lm.list_layers(tree, config)
  for found in (
    jax.jit(functools.partial(_apply, config))(tree, cache=cache),
    jax.jit(functools.partial(_apply, config, listed=True))(
      listed, cache=decoder_lm.list_cache(cache)
    ),
  ):
    # A cache has an order of its own for padding, which says nothing.
    valid = SEGMENTS > 0
    _close(found.logits[valid], logits[valid], tolerance=5e-5)
  again = dataclasses.replace(config, remat="full")
  _close(_loss_and_gradient(again)(tree)[1], gradient, tolerance=5e-5)


@pytest.mark.usefixtures("float64")
def test_masks_are_those_of_the_axes_with_new_indices():
  config = _large(
    SMALL,
    num_layers=2,
    mlp_dim=6,
    growth_mask=dataclasses.replace(
      MASK, value=0.25, embed_dim=9, new_layers=()
    ),
  )
  masks = make_masks(config)
  assert masks.mlp is None and masks.layers is None
  np.testing.assert_array_equal(masks.embed, [1] * 9 + [0.25] * 3)
  np.testing.assert_array_equal(
    masks.heads, [[1, 1, 0.25], [1, 1, 0.25], [0.25, 0.25, 0.25]]
  )
  np.testing.assert_array_equal(
    make_masks(_large(SMALL), 0.5).layers, [0.5, 1, 0.5, 1, 0.5]
  )
  half = dataclasses.replace(config, compute_dtype="bfloat16")
  assert masks.heads is not None and masks.heads.dtype == jnp.float64
  heads = make_masks(half).heads
  assert heads is not None and heads.dtype == jnp.float32


def test_a_model_without_a_mask_has_no_masks_and_takes_no_value():
  assert make_masks(SMALL) is NO_MASKS
  assert not jax.tree.leaves(NO_MASKS)
  with pytest.raises(ValueError, match="mask_value: the model has no growth"):
    make_masks(SMALL, 0.5)
