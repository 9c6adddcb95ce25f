"""Text in, text out."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tokenizers import processors

from aquila_jax.core import errors
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.generation import decoding
from aquila_jax.generation.generate import (
  end_of_text,
  generate,
  stop_tokens,
  stream,
)
from aquila_jax.generation.generate import text_model as from_stored
from aquila_jax.generation.sampling import Sampling
from aquila_jax.models import decoder_lm
from tests.generation.tiny import END_OF_TEXT, byte_tokenizer, text_model

GREEDY = Sampling(max_new_tokens=6, temperature=0.0, stop_tokens=())


def test_greedy_is_the_argmax_loop_without_a_cache(model, uncached_logits):
  (found,) = generate(model, ["hello"], sampling=GREEDY)
  tokens = model.tokenizer.encode("hello").ids
  for _ in range(6):
    logits = uncached_logits(model, tokens)[: model.tokenizer.get_vocab_size()]
    tokens.append(int(jnp.argmax(logits)))
  assert list(found.tokens) == tokens[5:]
  assert found.ended_by == "length"
  assert not found.finished


def test_a_greedy_continuation_does_not_depend_on_the_batch(model):
  prompts = ["a", "some longer prompt", "实例"]
  together = generate(model, prompts, sampling=GREEDY)
  alone = [generate(model, [p], sampling=GREEDY)[0] for p in prompts]
  assert together == alone
  assert len({row.tokens for row in together}) == 3


def test_the_same_seed_gives_the_same_text_and_another_another():
  model = text_model(False)

  def tokens(seed):
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=seed)
    return [g.tokens for g in generate(model, ["ab", "cd"], sampling=sampling)]

  assert tokens(0) == tokens(0)
  assert tokens(0) != tokens(1)


def test_stops_before_the_stop_token(model):
  (free,) = generate(model, ["x"], sampling=GREEDY)
  stop = free.tokens[3]
  (found,) = generate(
    model, ["x"], sampling=dataclasses.replace(GREEDY, stop_tokens=(stop,))
  )
  assert found.tokens == free.tokens[: free.tokens.index(stop)]
  assert found.finished


def test_the_tokenizers_end_of_text_is_the_stop_token():
  model = text_model(False)
  scale = jnp.zeros_like(model.params["final_norm"]["scale"])
  # All logits are 0: 16 rows draw evenly from the 257 ids with text.
  flat = dataclasses.replace(
    model, params=model.params | {"final_norm": {"scale": scale}}
  )
  rows = generate(flat, ["x"] * 16, sampling=Sampling(temperature=1.0))
  assert {row.ended_by for row in rows} == {"stop", "context"}
  for row in rows:
    assert END_OF_TEXT not in row.tokens
    assert row.finished == (len(row.tokens) < 63)


def test_the_models_own_stop_tokens_come_before_the_tokenizers():
  model = text_model(False)
  assert stop_tokens(model) == (END_OF_TEXT,)
  (free,) = generate(model, ["x"], sampling=GREEDY)
  stop = free.tokens[3]
  own = dataclasses.replace(model, stop_tokens=(9999, stop))
  assert stop_tokens(own) == (9999, stop)
  unsaid = dataclasses.replace(GREEDY, stop_tokens=None)
  (found,) = generate(own, ["x"], sampling=unsaid)
  assert found.tokens == free.tokens[: free.tokens.index(stop)]
  assert found.ended_by == "stop"
  # What the options say comes before both.
  assert generate(own, ["x"], sampling=GREEDY) == [free]


def test_a_text_model_has_the_stop_tokens_of_its_model():
  model = text_model(False)
  stored = StoredModel(
    config=model.config,
    lineage=Lineage(),
    params=model.params,
    tokenizer=model.tokenizer.to_str(),
    stop_tokens=(3, 4),
  )
  assert from_stored(stored).stop_tokens == (3, 4)


def test_end_of_text_is_the_only_special_token_or_a_usual_name():
  tokenizer = byte_tokenizer()
  assert end_of_text(tokenizer) == END_OF_TEXT
  tokenizer.add_special_tokens(["<pad>"])
  assert end_of_text(tokenizer) == END_OF_TEXT
  other = byte_tokenizer().from_str(
    byte_tokenizer().to_str().replace("<|endoftext|>", "<stop>")
  )
  assert end_of_text(other) == END_OF_TEXT
  other.add_special_tokens(["<pad>"])
  assert end_of_text(other) is None


def test_ends_at_the_context_and_says_so():
  model = text_model(False)
  long, short = "y" * 60, "z"
  sampling = dataclasses.replace(GREEDY, max_new_tokens=10)
  first, second = generate(model, [long, short], sampling=sampling)
  assert (len(first.tokens), first.ended_by) == (4, "context")
  assert (len(second.tokens), second.ended_by) == (10, "length")
  (alone,) = generate(model, [long], sampling=sampling)
  assert alone == first


@pytest.mark.parametrize("streams", [False, True])
def test_lengths_of_one_bucket_share_their_programs(streams):
  model = text_model(False)
  programs: dict[str, Any] = {
    name: getattr(decoding, name)
    for name in ("prefill_once", "advance_once", "advance_to_end")
  }
  for program in programs.values():
    program.clear_cache()
  # Up to 16 tokens of the prompt, and 5 to 8 new ones.
  for prompt, new in (("abc", 5), ("abcdefgh", 8), ("q" * 16, 6)):
    for options in (dict(), dict(top_k=3, seed=1, stop_tokens=(1, 2))):
      sampling = dataclasses.replace(
        GREEDY, max_new_tokens=new, **(options | dict(temperature=0.5))
      )
      if streams:
        assert list(stream(model, prompt, sampling=sampling))
      else:
        generate(model, [prompt], sampling=sampling)
  assert {name: one._cache_size() for name, one in programs.items()} == {
    "prefill_once": 1,
    "advance_once": int(streams),
    "advance_to_end": int(not streams),
  }


def test_nothing_is_compiled_as_the_text_grows(caplog):
  model = text_model(False)
  sampling = dataclasses.replace(GREEDY, max_new_tokens=16)
  pieces = stream(model, "abc", sampling=sampling)
  next(pieces)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    rest = list(pieces)
  assert len(rest) > 4
  assert [r.message for r in caplog.records if "ompil" in r.message] == []


@pytest.mark.parametrize("seed", range(2))
def test_streamed_pieces_are_the_text_in_whole_characters(seed):
  model = text_model(False)
  # A hot model over bytes: much of it is not valid UTF-8.
  sampling = Sampling(max_new_tokens=16, temperature=3.0, seed=seed)
  pieces = list(stream(model, "实例", sampling=sampling))
  (whole,) = generate(model, ["实例"], sampling=sampling)
  assert "".join(pieces) == whole.text
  assert all(pieces)


def test_a_character_of_three_tokens_comes_as_one_piece(monkeypatch):
  model = text_model(False)
  wanted = model.tokenizer.encode("a例b").ids
  assert len(wanted) == 5  # one byte, three, one

  # All tokens are there from the first step; stream shows one more a step.
  state = decoding.Decoding(
    cache=decoder_lm.make_cache(model.config, batch_size=1, num_slots=8),
    tokens=jnp.asarray([[*wanted, 0, 0, 0]], jnp.int32),
    count=jnp.asarray(1),
    lengths=jnp.asarray([1]),
    finished=jnp.asarray([False]),
  )
  for name in ("prefill_once", "advance_once"):
    monkeypatch.setattr(decoding, name, lambda *_, **__: state)
  sampling = Sampling(max_new_tokens=5, temperature=0.0, stop_tokens=())
  pieces = list(stream(model, "p", sampling=sampling))
  assert pieces == ["a", "例", "b"]


def test_streaming_stops_at_the_stop_token():
  model = text_model(False)
  (free,) = generate(model, ["x"], sampling=GREEDY)
  sampling = dataclasses.replace(GREEDY, stop_tokens=(free.tokens[2],))
  (whole,) = generate(model, ["x"], sampling=sampling)
  assert "".join(stream(model, "x", sampling=sampling)) == whole.text


def test_no_prompts_give_no_text():
  assert generate(text_model(False), [], sampling=GREEDY) == []


@pytest.mark.parametrize(
  ("prompt", "message"),
  [
    ("", "prompt='': has no tokens; give at least one character"),
    (
      "w" * 64,
      f"prompt='{'w' * 37}...': has 64 tokens; expected fewer than the model's"
      " context_length=64",
    ),
  ],
)
def test_refuses_prompts_that_cannot_be_continued(prompt, message):
  for call in (
    lambda: generate(text_model(False), ["ok", prompt], sampling=GREEDY),
    lambda: list(stream(text_model(False), prompt, sampling=GREEDY)),
  ):
    with pytest.raises(errors.UserError) as caught:
      call()
    assert str(caught.value) == message


def test_a_tokenizer_of_a_model_begins_every_text_with_its_end_of_text():
  model = text_model(False)
  tokenizer = byte_tokenizer()
  tokenizer.add_special_tokens(["<pad>"])
  tokenizer.post_processor = processors.TemplateProcessing(
    single=["<pad>", "$A"], special_tokens=[("<pad>", END_OF_TEXT + 1)]
  )
  assert end_of_text(tokenizer) == END_OF_TEXT + 1
  templated = dataclasses.replace(model, tokenizer=tokenizer)
  empty, _ = generate(templated, ["", "ab"], sampling=GREEDY)
  assert len(empty.tokens) == 6


def test_a_prompt_that_is_no_text_is_refused():
  with pytest.raises(errors.UserError) as caught:
    generate(text_model(False), ["a\udcff"], sampling=GREEDY)
  assert str(caught.value) == "prompt='a\\udcff': is not valid UTF-8"


def test_a_damaged_tokenizer_of_a_model_is_named():
  model = text_model(False)
  stored = StoredModel(
    config=model.config, lineage=Lineage(), params=model.params, tokenizer="{}"
  )
  with pytest.raises(errors.UserError) as caught:
    from_stored(stored)
  assert str(caught.value).startswith("the MODEL's tokenizer.json is damaged: ")
