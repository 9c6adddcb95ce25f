"""Ids in, ids out, against the model without a cache."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.generation import decoding
from aquila_jax.generation.generate import TextModel
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import (
  Timing,
  TokenGeneration,
  generate_tokens,
  stream_tokens,
)
from aquila_jax.models import decoder_lm
from tests.generation import tiny
from tests.generation.tiny import text_model

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46], [7], [8, 9]]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
SAMPLED = Sampling(
  max_new_tokens=6, temperature=1.5, top_k=50, top_p=0.9, seed=4
)


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
  """PROMPTS as an array; 99 is no padding token of anybody."""
  width = 8
  ids = np.full((len(PROMPTS), width), 99)
  mask = np.zeros(ids.shape, bool)
  for row, prompt in enumerate(PROMPTS):
    free = width - len(prompt)
    start = {"left": free, "right": 0, "both": free // 2}[side]
    ids[row, start : start + len(prompt)] = prompt
    mask[row, start : start + len(prompt)] = True
  return ids, mask


def call(model: TextModel, prompts, **options) -> list[TokenGeneration]:
  return generate_tokens(model.config, model.params, prompts, **options)


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "drawn"])
def test_padding_on_either_side_gives_each_prompt_as_alone(model, sampling):
  alone = [
    call(model, [prompt], sampling=sampling, row_ids=[row])[0]
    for row, prompt in enumerate(PROMPTS)
  ]
  assert len({one.tokens for one in alone}) == len(PROMPTS)
  assert call(model, PROMPTS, sampling=sampling) == alone
  for side in ("left", "right", "both"):
    ids, mask = padded(side)
    assert call(model, ids, mask=mask, sampling=sampling) == alone


def test_greedy_is_the_argmax_loop_without_a_cache(model, uncached_logits):
  ids, mask = padded("right")
  found = call(model, ids, mask=mask, sampling=GREEDY)
  for prompt, one in zip(PROMPTS, found, strict=True):
    read = list(prompt)
    for _ in range(6):
      read.append(int(jnp.argmax(uncached_logits(model, read))))
    assert list(one.tokens) == read[len(prompt) :]
    assert one.ended_by == "length"


def test_the_first_of_several_stop_tokens_ends_a_row():
  model = text_model(False)
  sampling = dataclasses.replace(GREEDY, max_new_tokens=8)
  free = [one.tokens for one in call(model, PROMPTS, sampling=sampling)]
  # Five of them: more than the four that the smallest array holds.
  unseen = [i for i in range(264) if all(i not in row for row in free)]
  stops = (unseen[0], free[0][2], unseen[1], free[1][4], unseen[2])
  found = call(
    model,
    PROMPTS,
    sampling=dataclasses.replace(sampling, stop_tokens=stops),
  )
  for row, one in zip(free, found, strict=True):
    places = [i for i, token in enumerate(row) if token in stops]
    assert one.tokens == row[: min(places, default=8)]
    assert one.ended_by == ("stop" if places else "length")


def test_ids_from_vocab_size_on_are_never_chosen():
  model = text_model(False)
  hot = Sampling(max_new_tokens=16, temperature=20.0)
  (found,) = call(model, [[1]], sampling=hot, vocab_size=5)
  assert set(found.tokens) <= set(range(5))
  (found,) = call(model, [[1]], sampling=hot)
  assert max(found.tokens) >= 5


def test_a_stream_grows_to_what_generate_gives(model):
  (whole,) = call(model, PROMPTS[:1], sampling=SAMPLED)
  known = list(
    stream_tokens(model.config, model.params, PROMPTS[0], sampling=SAMPLED)
  )
  assert [one.tokens for one in known] == [
    whole.tokens[:count] for count in range(1, 7)
  ]
  assert known[-1] == whole


def test_a_timing_counts_what_it_was_given_for():
  model = text_model(False)
  timing = Timing()
  free = call(model, PROMPTS, sampling=GREEDY, timing=timing)
  assert free == call(model, PROMPTS, sampling=GREEDY)
  # 3 + 7 + 1 + 2 of the prompts; of each row's 6 the first is of the prefill.
  assert (timing.prompt_tokens, timing.decoded_tokens) == (13, 4 * 5)
  assert min(timing.compile_s, timing.prefill_s, timing.decode_s) > 0
  stop = free[0].tokens[3]
  sampling = dataclasses.replace(GREEDY, stop_tokens=(stop,))
  stream = stream_tokens(
    model.config, model.params, PROMPTS[0], sampling=sampling, timing=timing
  )
  steps = len(list(stream)) - 1
  assert steps == free[0].tokens.index(stop)
  assert (timing.prompt_tokens, timing.decoded_tokens) == (16, 20 + steps)


@pytest.mark.parametrize(
  ("timing", "words"),
  [
    (
      Timing(
        compile_s=1.23,
        prefill_s=0.0456,
        decode_s=2.0,
        prompt_tokens=12,
        decoded_tokens=63,
      ),
      "prefill: 12 tokens in 46 ms; decode: 63 tokens at 31.5 tokens/s; 1.2 s"
      " to compile, before",
    ),
    (
      Timing(prefill_s=1.0, prompt_tokens=1),
      "prefill: 1 tokens in 1000 ms; 0.0 s to compile, before",
    ),
  ],
)
def test_a_timing_in_words(timing, words):
  assert timing.in_words() == words


def test_no_prompts_give_nothing():
  assert call(text_model(False), [], sampling=GREEDY) == []


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([[1], []], {}, "prompts[1]: has no tokens; need at least 1"),
    (
      [[1] * 64],
      {},
      "prompts[0]: has 64 tokens; expected fewer than the model's"
      " context_length=64",
    ),
    (
      [[1], [2, 264]],
      {},
      "prompts[1]: has the id 264; need 0 <= id < vocab_size=264",
    ),
    (
      [[-1]],
      {},
      "prompts[0]: has the id -1; need 0 <= id < vocab_size=264",
    ),
    (
      np.ones((2, 3), int),
      dict(mask=np.ones((2, 4), bool)),
      "mask: has shape (2, 4); need that of prompts, (2, 3)",
    ),
    (
      [[1], [2]],
      dict(row_ids=[0]),
      "row_ids: has 1 numbers; need one for each of the 2 prompts",
    ),
    (
      [[1]],
      dict(sampling=Sampling(stop_tokens=(3, 264))),
      "stop_tokens=(3, 264): need ids < vocab_size=264",
    ),
  ],
)
def test_refuses_what_the_model_cannot_read(prompts, options, message):
  with pytest.raises(errors.UserError) as caught:
    call(text_model(False), prompts, **(dict(sampling=GREEDY) | options))
  assert str(caught.value) == message


def test_experts_that_choose_cannot_continue_a_text():
  config = tiny.model_config(moe=True)
  assert config.moe is not None
  moe = dataclasses.replace(
    config.moe,
    choice="expert",
    router_order="sigmoid",
    renormalise=False,
    capacity_factor=None,
  )
  config = dataclasses.replace(config, moe=moe)
  message = (
    "model.moe.choice='expert' is not causal: experts choose among all tokens"
    " of a batch, later ones included, and no text can be continued with it;"
    " expected 'token'"
  )
  cache = decoder_lm.make_cache(config, batch_size=1, num_slots=4)
  row = jnp.ones((1, 1), jnp.int32)
  for refused in (
    lambda: generate_tokens(config, {}, [[1]], sampling=GREEDY),
    lambda: next(stream_tokens(config, {}, [1], sampling=GREEDY)),
    lambda: decoding.append(
      config, {}, row, positions=row, segments=row, cache=cache
    ),
  ):
    with pytest.raises(errors.UserError) as caught:
      refused()
    assert str(caught.value) == message
