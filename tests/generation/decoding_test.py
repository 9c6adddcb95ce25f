"""Prefill and steps over the cache, against the model without one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.generation import decoding, sampling
from aquila_jax.generation.sampling import Sampling
from aquila_jax.models import decoder_lm
from tests.generation.tiny import model_config, text_model

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46]]
NO_STOP = jnp.asarray(-1, jnp.int32)


def left_padded(prompts: list[list[int]], width: int) -> jnp.ndarray:
  rows = [[99] * (width - len(row)) + row for row in prompts]
  return jnp.asarray(rows, jnp.int32)


def test_cached_logits_are_those_without_a_cache(model, uncached_logits):
  rows = jnp.asarray([[0, 0, 5, 9, 17, 3], [40, 41, 42, 43, 44, 45]], jnp.int32)
  first = jnp.asarray([[2], [0]], jnp.int32)  # slot of the first token
  slots = jnp.arange(6)[None]
  positions = jnp.maximum(slots - first, 0)
  segments = (slots >= first).astype(jnp.int32)
  config = decoding.inference_config(model.config)
  append = jax.jit(functools.partial(decoding.append, config))

  cache = decoder_lm.make_cache(config, batch_size=2, num_slots=8)
  # Four slots at once, then one by one.
  for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
    logits, cache = append(
      model.params,
      rows[:, part],
      positions=positions[:, part],
      segments=segments[:, part],
      cache=cache,
    )
    for row in range(2):
      read = rows[row, int(first[row, 0]) : part.stop].tolist()
      # float32, sums of at most 24 terms of size about 1 in 2 layers: some
      # hundred roundings of 6e-8 on logits of size about 10.
      np.testing.assert_allclose(
        logits[row], uncached_logits(model, read), atol=2e-5, rtol=2e-5
      )


def test_a_finished_row_does_not_disturb_the_other():
  model = text_model(True)
  chooser = sampling.make_chooser(
    Sampling(temperature=0.0), batch_size=2, vocab_size=256
  )

  def run(stop_token):
    return decoding.decode_all(
      model.config,
      model.params,
      left_padded(PROMPTS, 8),
      jnp.asarray([3, 7], jnp.int32),
      chooser=chooser,
      stop_tokens=jnp.asarray([stop_token], jnp.int32),
      limit=jnp.asarray(8, jnp.int32),
      max_new_tokens=8,
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
  fixed = dict(chooser=chooser, limit=jnp.asarray(7, jnp.int32))

  def run(stop_token):
    return decoding.decode_all(
      model.config,
      model.params,
      left_padded(PROMPTS[:1], 8),
      jnp.asarray([3], jnp.int32),
      stop_tokens=jnp.asarray([stop_token], jnp.int32),
      max_new_tokens=8,
      **fixed,
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
