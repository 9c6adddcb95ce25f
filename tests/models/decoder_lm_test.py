"""The decoder as a whole: packing, remat, tying, declared axes, cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.axes import Role
from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
  MoeConfig,
)
from aquila_jax.layers import rotary
from aquila_jax.layers.attention import Attention
from aquila_jax.models import decoder_lm

DENSE = ModelConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  mlp_dim=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  rope_theta=100.0,
  compute_dtype="float32",
)
DROPLESS = dataclasses.replace(
  DENSE, moe=MoeConfig(num_experts=4, top_k=2, block_size=4)
)
SHARED = MoeConfig(num_experts=4, top_k=2, block_size=4, shared_expert_dim=5)
EVERYTHING = dataclasses.replace(
  DENSE,
  qk_norm=True,
  out_bias=True,
  sliding_window=3,
  rope_scaling=Llama3RopeScaling(factor=4.0, original_context_length=30),
  moe=SHARED,
)


@functools.cache
def _params(config: ModelConfig):
  """Random parameters, of which biases and scales are not special."""
  params = jax.jit(functools.partial(decoder_lm.init_params, config))(
    key=jax.random.key(0)
  )
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return structure.unflatten(
    [
      leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
  )


@functools.cache
def _model(config: ModelConfig):
  @jax.jit
  def apply(params, tokens, positions, segments, cache=None):
    return decoder_lm.DecoderLM(config).apply(
      {"params": params},
      tokens,
      positions=positions,
      segments=segments,
      cache=cache,
    )

  return apply


def _pack(*documents, length: int = 16):
  """Documents side by side in one row, padding after them."""
  tokens, positions, segments = (np.zeros((1, length), np.int32) for _ in "123")
  start = 0
  for number, document in enumerate(documents, 1):
    part = slice(start, start + len(document))
    tokens[0, part], segments[0, part] = document, number
    positions[0, part] = np.arange(len(document))
    start += len(document)
  return tokens, positions, segments


DOCUMENT = [3, 1, 4, 1, 5]


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize(
  "config",
  [
    DENSE,
    DROPLESS,
    dataclasses.replace(DROPLESS, tied_embeddings=True, qkv_bias=False),
    EVERYTHING,
  ],
  ids=["dense", "dropless", "tied", "everything"],
)
def test_logits_do_not_change_with_what_else_is_in_the_row(config):
  params, model = _params(config), _model(config)
  alone = model(params, *_pack(DOCUMENT)).logits[0, :5]
  assert jnp.std(alone) > 0.1
  for row, start in [
    (_pack([9, 2, 6], DOCUMENT, [5, 3]), 3),
    (_pack([8], [8], DOCUMENT, [7] * 9), 2),
    (_pack(DOCUMENT, DOCUMENT, DOCUMENT), 5),
  ]:
    found = model(params, *row).logits[0, start : start + 5]
    # A product of another slot may be summed in another order: 1e-6 is
    # some ten roundings of logits of a few units.
    np.testing.assert_allclose(found, alone, atol=2e-6)


def test_capacity_lets_documents_compete():
  """The claim above holds for dropless only; the test can fail."""
  moe = MoeConfig(num_experts=4, top_k=2, capacity_factor=0.5)
  config = dataclasses.replace(DENSE, moe=moe)
  params, model = _params(config), _model(config)
  alone = model(params, *_pack(DOCUMENT)).logits[0, :5]
  row = _pack([9, 2, 6, 9, 2, 6, 1], DOCUMENT)
  found = model(params, *row).logits[0, 7:12]
  assert not np.allclose(found, alone, atol=1e-3)


@pytest.mark.parametrize("config", [DENSE, DROPLESS], ids=["dense", "dropless"])
def test_later_tokens_change_nothing_and_earlier_ones_do(config):
  params, model = _params(config), _model(config)
  logits = model(params, *_pack(DOCUMENT)).logits[0]
  changed = model(params, *_pack([3, 1, 4, 2, 5])).logits[0]
  np.testing.assert_allclose(changed[:3], logits[:3], atol=2e-6)
  assert np.all(np.max(np.abs(changed[3:5] - logits[3:5]), axis=-1) > 1e-3)


@pytest.mark.mostly_long(one_in=4)
@pytest.mark.parametrize(
  ("change", "leaves"),
  [
    (dict(qkv_bias=False), {"query_bias", "key_bias", "value_bias"}),
    (dict(out_bias=False), {"out_bias"}),
    (dict(qk_norm=False), {"query_norm", "key_norm"}),
    (dict(shared_expert_dim=0), {"shared"}),
    (dict(shared_expert_gate=False), {"token_gate_kernel"}),
  ],
  # A set has no order; tests are named the same in all processes.
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_leaves_of_an_option_are_there_only_with_it_and_have_an_effect(
  change, leaves
):
  if next(iter(change)).startswith("shared"):
    changed = dataclasses.replace(
      EVERYTHING, moe=dataclasses.replace(SHARED, **change)
    )
  else:
    changed = dataclasses.replace(EVERYTHING, **change)

  def keys(config):
    flat = jax.tree.leaves_with_path(decoder_lm.abstract_params(config))
    return {axes.path_name(path) for path, _ in flat}

  gone = keys(EVERYTHING) - keys(changed)
  assert keys(changed) < keys(EVERYTHING)
  assert leaves == {
    next(part for part in name.split("/") if part in leaves) for name in gone
  }
  params, row = _params(EVERYTHING), _pack(DOCUMENT, [2, 7, 1, 8, 2])
  base = _model(EVERYTHING)(params, *row).logits
  fewer: dict = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    if axes.path_name(path) not in gone:
      node = fewer
      for entry in path[:-1]:
        node = node.setdefault(entry.key, {})
      node[path[-1].key] = leaf
  found = _model(changed)(fewer, *row).logits
  assert np.max(np.abs(found - base)) > 1e-3


def test_every_option_together_continues_a_row_in_the_cache():
  params, model = _params(EVERYTHING), _model(EVERYTHING)
  whole = model(params, *_pack(DOCUMENT, length=5))
  cache = decoder_lm.make_cache(EVERYTHING, batch_size=1, num_slots=8)
  parts = []
  for window in (slice(0, 3), slice(3, 4), slice(4, 5)):
    row = [part[:, window] for part in _pack(DOCUMENT, length=5)]
    out = model(params, *row, cache)
    cache = out.cache
    parts.append(out.logits)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), whole.logits, atol=1e-5
  )


def _written_out(config: ModelConfig, params, tokens, positions):
  """The dense decoder, layer by layer, in einsums of one document."""

  def norm(x, scale):
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(mean + config.norm_epsilon) * scale[None, None]

  tables = rotary.rotary_tables(
    jnp.asarray(positions), head_dim=4, theta=config.rope_theta
  )
  table = params["embedding"]["table"]
  x = table[tokens]
  past = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
  for i in range(config.num_layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    attention, mlp = layer["attention"], layer["mlp"]
    normed = norm(x, layer["attention_norm"]["scale"])
    query, key, value = (
      jnp.tensordot(normed, attention[f"{name}_kernel"], 1)
      + attention[f"{name}_bias"][None, None]
      for name in ("query", "key", "value")
    )
    query, key = rotary.rotate(query, tables), rotary.rotate(key, tables)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", query, key) / 2  # sqrt(4)
    logits = jnp.where(past[None, None, None], logits, -1e30)
    heads = jnp.einsum(
      "BKGTS,BSKH->BTKGH", jax.nn.softmax(logits, axis=-1), value
    )
    x = x + jnp.einsum("BTKGH,KGHD->BTD", heads, attention["out_kernel"])
    normed = norm(x, layer["mlp_norm"]["scale"])
    hidden = jax.nn.silu(normed @ mlp["gate_kernel"])
    x = x + hidden * (normed @ mlp["up_kernel"]) @ mlp["down_kernel"]
  x = norm(x, params["final_norm"]["scale"])
  head = table.T if config.tied_embeddings else params["lm_head"]["kernel"]
  return x @ head


@pytest.mark.parametrize("tied", [False, True])
def test_dense_decoder_and_gradients_equal_the_written_out_one(tied):
  config = dataclasses.replace(DENSE, tied_embeddings=tied)
  params = _params(config)
  tokens, positions, segments = _pack(DOCUMENT, length=5)
  upstream = jax.random.normal(jax.random.key(2), (1, 5, 11))

  def scanned(params):
    return _model(config)(params, tokens, positions, segments).logits

  def plain(params):
    return _written_out(config, params, tokens, positions)

  found, expected = (
    jax.jit(
      jax.value_and_grad(
        lambda p, f=f: (jnp.sum(upstream * f(p)), f(p)), has_aux=True
      )
    )(params)
    for f in (scanned, plain)
  )
  # Some 20 products in a chain with sums of up to 24: 20 sqrt(24) roundings of
  # gradients of some tens are 1e-4.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
    found,
    expected,
  )


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("config", [DENSE, DROPLESS], ids=["dense", "dropless"])
@pytest.mark.parametrize(
  "change",
  [
    dict(remat="dots"),
    dict(remat="full"),
    dict(scan_layers=False),
    dict(scan_layers=False, remat="dots"),
  ],
)
def test_remat_and_unrolling_change_no_loss_and_no_gradient(config, change):
  row = _pack(DOCUMENT, [2, 7, 1])

  def value_and_grad(config):
    def loss(params):
      out = _model(config)(params, *row)
      total = jnp.mean(jax.nn.logsumexp(out.logits, axis=-1))
      if out.routing is not None:
        total += jnp.mean(out.routing.balance_loss)
      return total

    return jax.value_and_grad(loss)(_params(config))

  again = dataclasses.replace(config, **change)
  # The same operations, fused in another way: a few roundings.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    value_and_grad(again),
    value_and_grad(config),
  )


def test_a_scan_of_layers_is_a_loop_and_can_be_unrolled():
  row = [jnp.asarray(part) for part in _pack(DOCUMENT, [2, 7, 1])]

  def loops(config):
    model = decoder_lm.DecoderLM(config)
    text = jax.jit(
      lambda p: model.apply(
        {"params": p}, row[0], positions=row[1], segments=row[2]
      )
    )
    compiled = text.lower(_params(config)).compile().as_text()
    return sum(" while(" in line for line in (compiled or "").splitlines())

  assert loops(DENSE) == 1
  assert loops(dataclasses.replace(DENSE, scan_layers=False)) == 0


@pytest.mark.parametrize("config", [DENSE, DROPLESS], ids=["dense", "dropless"])
def test_cache_continues_a_row(config):
  params, model = _params(config), _model(config)
  whole = model(params, *_pack(DOCUMENT, length=5))
  assert whole.cache is None
  cache = decoder_lm.make_cache(config, batch_size=1, num_slots=8)
  parts = []
  for window in (slice(0, 3), slice(3, 4), slice(4, 5)):
    row = [part[:, window] for part in _pack(DOCUMENT, length=5)]
    out = model(params, *row, cache)
    cache = out.cache
    parts.append(out.logits)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), whole.logits, atol=1e-5
  )
  assert cache.length.tolist() == [5, 5]


def test_chosen_experts_are_collected_layer_by_layer_if_asked():
  row = [jnp.asarray(part) for part in _pack(DOCUMENT, [2, 7, 1])]
  model = decoder_lm.DecoderLM(DROPLESS)

  def apply(params, **options) -> Any:
    return model.apply(
      {"params": params},
      row[0],
      positions=row[1],
      segments=row[2],
      **options,
    )

  params = _params(DROPLESS)
  collect = functools.partial(apply, mutable=["intermediates"])
  _, variables = jax.eval_shape(collect, params)
  (ids,) = variables["intermediates"]["layers"]["mlp"]["experts"]
  assert ids.shape == (2, *row[0].shape, 2) and ids.dtype == jnp.int32


def test_routing_is_stacked_over_layers():
  out = _model(DROPLESS)(_params(DROPLESS), *_pack(DOCUMENT))
  assert out.routing.load.shape == (2, 4)
  np.testing.assert_allclose(jnp.sum(out.routing.load, axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(out.routing.dropped, 0)
  assert _model(DENSE)(_params(DENSE), *_pack(DOCUMENT)).routing is None


@pytest.mark.parametrize(
  "config",
  [
    DENSE,
    DROPLESS,
    dataclasses.replace(DENSE, tied_embeddings=True),
    EVERYTHING,
  ],
  ids=["dense", "dropless", "tied", "everything"],
)
def test_every_leaf_declares_axes_of_its_own_sizes(config):
  sizes = dict(
    layer=2,
    vocab=11,
    embed=8,
    kv_head=2,
    q_per_kv=2,
    head_dim=4,
    mlp=6,
    expert=4,
    shared_mlp=5,
    shared_expert=1,
  )
  shapes = decoder_lm.abstract_params(config)
  declared = decoder_lm.parameter_axes(config)
  assert jax.tree.structure(shapes) == jax.tree.structure(declared)
  for (path, leaf), leaf_axes in zip(
    jax.tree.leaves_with_path(shapes), jax.tree.leaves(declared), strict=True
  ):
    assert leaf.shape == tuple(sizes[name] for name in leaf_axes.names), path
    in_stack = axes.path_name(path).startswith("layers/")
    assert (leaf_axes.index("layer") == 0) == in_stack
    assert leaf_axes.has("layer") == in_stack


def test_final_norm_reads_embed_only_in_front_of_a_tied_head():
  for tied, role in [(True, Role.READS), (False, Role.WRITES)]:
    config = dataclasses.replace(DENSE, tied_embeddings=tied)
    declared = decoder_lm.parameter_axes(config)
    assert declared["final_norm"]["scale"].has("embed", role)
    assert ("lm_head" in declared) == (not tied)


@pytest.mark.parametrize("config", [DENSE, DROPLESS], ids=["dense", "dropless"])
def test_abstract_parameters_are_those_that_init_makes(config):
  config = dataclasses.replace(config, param_dtype="bfloat16")
  made = jax.eval_shape(
    functools.partial(decoder_lm.init_params, config), key=jax.random.key(0)
  )
  assert made == decoder_lm.abstract_params(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {
    jnp.dtype("bfloat16")
  }


@pytest.mark.parametrize("layers", ["all", (0,)], ids=["alike", "mixed"])
def test_a_layer_is_traced_once_for_its_shapes_and_where_it_draws_nothing(
  layers,
):
  moe = MoeConfig(num_experts=3, block_size=4, layers=layers)
  # Of a vocabulary that no other test has: shapes are kept.
  config = dataclasses.replace(DENSE, moe=moe, vocab_size=12)
  traced = 0

  def count(function, arguments, keywords, context):
    nonlocal traced
    is_call = context.method_name == "__call__"
    traced += isinstance(context.module, Attention) and is_call
    return function(*arguments, **keywords)

  kinds = 1 if layers == "all" else 2
  row = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  with nn.intercept_methods(count):
    params = decoder_lm.abstract_params(config)
    # What is mapped is called once more where it is initialised.
    assert traced == kinds * (1 if layers == "all" else 2)
    traced = 0
    jax.eval_shape(_apply(config), params, row)
    assert traced == kinds


def _apply(config: ModelConfig):
  def apply(params, row):
    model = decoder_lm.DecoderLM(config)
    return model.apply({"params": params}, row, positions=row, segments=row)

  return apply


def test_init_has_the_deviation_asked_for_and_differs_by_layer():
  config = dataclasses.replace(
    DROPLESS,
    embed_dim=64,
    mlp_dim=64,
    init_std=0.1,
    moe=MoeConfig(num_experts=4, router_init_std=0.5),
  )
  params = jax.jit(functools.partial(decoder_lm.init_params, config))(
    key=jax.random.key(0)
  )
  layers = params["layers"]
  kernel = layers["mlp"]["up_kernel"]  # 32,768 values: 0.4% of deviation
  assert abs(jnp.std(kernel) / 0.1 - 1) < 0.02
  router = layers["mlp"]["router"]["kernel"]  # 512 values: 3%
  assert abs(jnp.std(router) / 0.5 - 1) < 0.15
  assert jnp.max(jnp.abs(kernel[0] - kernel[1])) > 0.1
  assert jnp.max(jnp.abs(kernel[0, 0] - kernel[0, 1])) > 0.1
  np.testing.assert_array_equal(layers["attention"]["query_bias"], 0)
  np.testing.assert_array_equal(layers["mlp_norm"]["scale"], 1)


@pytest.mark.mostly_long(one_in=4)
@pytest.mark.parametrize(
  "change",
  [
    dict(rope_theta=1000.0),
    dict(norm_epsilon=0.1),
    dict(compute_dtype="bfloat16"),
    dict(moe=MoeConfig(num_experts=4, top_k=1)),
    dict(
      moe=MoeConfig(
        num_experts=4, router_order="softmax_then_topk", renormalise=False
      )
    ),
    dict(moe=MoeConfig(num_experts=4, capacity_factor=0.2)),
    dict(sliding_window=2),
    dict(rope_scaling=LinearRopeScaling(factor=2.0)),
    # Of the two wavelengths, 2 pi and 20 pi, the longer is more than 30 tokens.
    dict(
      rope_scaling=Llama3RopeScaling(factor=2.0, original_context_length=30)
    ),
  ],
  ids=str,
)
def test_field_has_an_effect(change):
  params = _params(DROPLESS)
  row = _pack(DOCUMENT, [2, 7, 1, 8, 2])
  base = _model(DROPLESS)(params, *row).logits
  changed = _model(dataclasses.replace(DROPLESS, **change))(params, *row)
  assert changed.logits.dtype == jnp.float32
  assert np.max(np.abs(changed.logits - base)) > 1e-4
