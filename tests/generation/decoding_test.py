"""Prefill and steps over the cache, against the model without one."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
  MoeConfig,
)
from aquila_jax.generation import decoding, sampling
from aquila_jax.generation.generate import TextModel
from aquila_jax.generation.sampling import Sampling
from aquila_jax.models import decoder_lm
from aquila_jax.models.decoder_lm import DecoderLM
from tests.generation.tiny import byte_tokenizer, model_config, text_model

# Only there are parameters listed, and are there 8 devices.
on_cpu = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="a rule for CPUs"
)
layers_both_ways = pytest.mark.parametrize(
  "listed", [False, pytest.param(True, marks=on_cpu)], ids=["stacked", "listed"]
)
PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46]]


def left_padded(prompts: list[list[int]], width: int) -> jnp.ndarray:
  rows = [[99] * (width - len(row)) + row for row in prompts]
  return jnp.asarray(rows, jnp.int32)


def decode_all(model: TextModel, prompts, lengths, *, limit: int, **options):
  """The new tokens, and how many of the columns are filled."""
  state = decoding.prefill_once(
    model.config, model.params, prompts, lengths, max_new_tokens=8, **options
  )
  state = decoding.advance_to_end(
    model.config,
    model.params,
    state,
    limit=jnp.asarray(limit, jnp.int32),
    **options,
  )
  return state.tokens, state.count


def in_parts(config, params, *, listed: bool, num_slots: int = 8):
  """Logits after each of the parts of ROWS, read through the cache."""
  config = decoding.inference_config(config)
  append = jax.jit(functools.partial(decoding.append, config))
  positions = jnp.maximum(jnp.arange(6)[None] - FIRST[:, None], 0)
  segments = (jnp.arange(6)[None] >= FIRST[:, None]).astype(jnp.int32)
  cache: Any = decoder_lm.make_cache(config, batch_size=2, num_slots=num_slots)
  if listed:
    cache, params = (
      decoder_lm.list_cache(cache),
      decoding.step_params(params, config),
    )
    assert decoding.is_listed(params)
  for part in PARTS:
    logits, cache = append(
      params,
      ROWS[:, part],
      positions=positions[:, part],
      segments=segments[:, part],
      cache=cache,
    )
    yield part.stop, logits


# Two tokens of padding stand in front of the first row.
ROWS = jnp.asarray([[0, 0, 5, 9, 17, 3], [40, 41, 42, 43, 44, 45]], jnp.int32)
FIRST = jnp.asarray([2, 0], jnp.int32)
# Four slots at once, then one by one.
PARTS = (slice(0, 4), slice(4, 5), slice(5, 6))
# float32, sums of at most 24 terms of size about 1 in 2 layers: some hundred
# roundings of 6e-8 on logits of size about 10.
TOLERANCE: dict[str, Any] = dict(atol=2e-5, rtol=2e-5)


def assert_as_without_a_cache(model, uncached_logits, *, listed: bool):
  for stop, logits in in_parts(model.config, model.params, listed=listed):
    for row in range(2):
      read = ROWS[row, int(FIRST[row]) : stop].tolist()
      expected = uncached_logits(model, read)
      np.testing.assert_allclose(logits[row], expected, **TOLERANCE)


@pytest.mark.mostly_long(one_in=3)
@layers_both_ways
def test_cached_logits_are_those_without_a_cache(
  model, uncached_logits, listed
):
  assert_as_without_a_cache(model, uncached_logits, listed=listed)


LLAMA3 = Llama3RopeScaling(factor=4.0, original_context_length=8)
# What a pretrained model may have, each option in several company.
OPTIONS = {
  "qwen3": dict(qk_norm=True, qkv_bias=False, tied_embeddings=True),
  "qwen2": dict(qkv_bias=True, out_bias=False, sliding_window=3),
  "all biases": dict(
    qkv_bias=True, out_bias=True, qk_norm=True, rope_scaling=LLAMA3
  ),
  "window": dict(
    sliding_window=2, out_bias=True, rope_scaling=LinearRopeScaling(factor=2.0)
  ),
}
SHARED = MoeConfig(
  num_experts=4, block_size=4, router_init_std=1.0, shared_expert_dim=8
)


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("moe", [None, SHARED], ids=["dense", "shared expert"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cached_logits_with_options_are_those_without_a_cache(
  options, moe, uncached_logits
):
  config = dataclasses.replace(model_config(moe=False, **options), moe=moe)
  keys = iter(jax.random.split(jax.random.key(1), 100))
  # Biases begin as zeros and scales as ones: neither would show.
  params = jax.tree.map(
    lambda leaf: 0.4 * jax.random.normal(next(keys), leaf.shape),
    decoder_lm.abstract_params(config),
  )
  model = TextModel(config=config, params=params, tokenizer=byte_tokenizer())
  listed = jax.default_backend() == "cpu"
  assert_as_without_a_cache(model, uncached_logits, listed=listed)


def test_a_listed_decoder_answers_as_the_scanned_one(model):
  config = decoding.inference_config(model.config)
  row: dict[str, Any] = dict(
    positions=jnp.maximum(jnp.arange(6)[None] - FIRST[:, None], 0),
    segments=(jnp.arange(6)[None] >= FIRST[:, None]).astype(jnp.int32),
  )

  def apply(params, **options):
    decoder = DecoderLM(config, listed="layers" not in params)
    function = functools.partial(decoder.apply, **options)
    return jax.jit(function)({"params": params}, ROWS, **row)

  listed = decoding.step_params(model.params, config)
  found: Any = apply(listed)
  expected: Any = apply(model.params)
  assert found.cache is None
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), found, expected
  )
  last: Any = apply(listed, last_only=True)
  np.testing.assert_allclose(last.logits, found.logits[:, -1:], **TOLERANCE)


@on_cpu
def test_listed_parameters_are_views_of_the_stacked_ones():
  params, config = text_model(False).params, text_model(False).config
  listed = decoding.step_params(params, config)
  assert not decoding.is_listed(params) and decoding.is_listed(listed)
  stacked = jax.tree_util.tree_leaves_with_path(params["layers"])
  for i in range(2):
    layer = dict(jax.tree_util.tree_leaves_with_path(listed[f"layer_{i}"]))
    for path, leaf in stacked:
      np.testing.assert_array_equal(layer[path], leaf[i])
  # The second layer lies where the stack has it: nothing was copied.
  stack = params["layers"]["mlp"]["up_kernel"]
  (second,) = (listed["layer_1"]["mlp"]["up_kernel"],)
  distance = second.unsafe_buffer_pointer() - stack.unsafe_buffer_pointer()
  assert distance == 16 * 24 * 4


@on_cpu
def test_of_layers_of_two_kinds_each_has_its_own_rows():
  moe = MoeConfig(num_experts=2, layers=(1,))
  config = dataclasses.replace(
    model_config(moe=False), moe=moe, num_layers=3, vocab_size=4
  )
  params = jax.tree.map(
    lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape),
    decoder_lm.abstract_params(config),
  )
  listed = decoding.step_params(params, config)
  stack = params["layers"]
  for layer, part, row in (
    (0, "dense_mlp", 0),
    (1, "mlp", 0),
    (2, "dense_mlp", 1),
  ):
    found = listed[f"layer_{layer}"]
    assert ("mlp" in found) == (part == "mlp")
    for name in ("gate_kernel", "down_kernel"):
      np.testing.assert_array_equal(found[part][name], stack[part][name][row])
    np.testing.assert_array_equal(
      found["attention"]["out_kernel"], stack["attention"]["out_kernel"][layer]
    )


@on_cpu
def test_parameters_on_several_devices_stay_stacked():
  params, config = text_model(False).params, text_model(False).config
  mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  spread_params = jax.device_put(params, spread)
  assert decoding.step_params(spread_params, config) is spread_params


@pytest.mark.mostly_long(one_in=3)
@layers_both_ways
def test_a_generation_from_stacked_and_listed_layers_is_the_same(model, listed):
  params = model.params
  if listed:
    params = decoding.step_params(params, model.config)
  options: Any = dict(
    chooser=sampling.make_chooser(
      Sampling(temperature=0.0), batch_size=2, vocab_size=256
    ),
    stop_tokens=jnp.asarray([-1], jnp.int32),
  )
  state = decoding.prefill_once(
    model.config,
    model.params,
    left_padded(PROMPTS, 8),
    jnp.asarray([3, 7], jnp.int32),
    max_new_tokens=8,
    listed=listed,
    **options,
  )
  for _ in range(3):
    state = decoding.advance_once(model.config, params, state, **options)
  whole, _ = decode_all(
    model,
    left_padded(PROMPTS, 8),
    jnp.asarray([3, 7], jnp.int32),
    limit=4,
    **options,
  )
  np.testing.assert_array_equal(state.tokens[:, :4], whole[:, :4])


def test_a_finished_row_does_not_disturb_the_other():
  model = text_model(True)
  chooser = sampling.make_chooser(
    Sampling(temperature=0.0), batch_size=2, vocab_size=256
  )

  def run(stop_token):
    return decode_all(
      model,
      left_padded(PROMPTS, 8),
      jnp.asarray([3, 7], jnp.int32),
      chooser=chooser,
      stop_tokens=jnp.asarray([stop_token], jnp.int32),
      limit=8,
    )

  free, _ = run(-1)
  first = int(free[0, 0])
  assert first not in np.asarray(free[1])  # so that row 1 goes on
  stopped, count = run(first)
  assert int(count) == 8
  assert np.asarray(stopped[1]).tolist() == np.asarray(free[1]).tolist()


def test_the_loop_ends_when_every_row_has_stopped():
  model = text_model(False)
  chooser = sampling.make_chooser(
    Sampling(temperature=0.0), batch_size=1, vocab_size=256
  )

  def run(stop_token):
    return decode_all(
      model,
      left_padded(PROMPTS[:1], 8),
      jnp.asarray([3], jnp.int32),
      chooser=chooser,
      stop_tokens=jnp.asarray([stop_token], jnp.int32),
      limit=7,
    )

  tokens, count = run(-1)
  assert int(count) == 7
  row = np.asarray(tokens)[0].tolist()
  _, count = run(row[2])
  assert int(count) == row.index(row[2]) + 1


@pytest.mark.parametrize(
  ("num_tokens", "block_size"), [(0, 4), (1, 1), (4, 2), (100, 4)]
)
def test_inference_is_dropless_in_blocks_of_the_mean_load(
  num_tokens, block_size
):
  # top_k 2 of 4 experts: 4 tokens give an expert 2 rows on average.
  config = model_config(moe=True, remat="full")
  found = decoding.inference_config(config, num_tokens=num_tokens)
  assert found.moe is not None
  assert found.moe.capacity_factor is None
  assert found.moe.block_size == block_size
  assert found.remat == "none"


def test_inference_of_a_dense_model_changes_no_shape():
  config = model_config(moe=False)
  assert decoding.inference_config(config) == config
