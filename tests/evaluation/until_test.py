"""Continuations up to strings, against one greedy row at a time."""

from __future__ import annotations

import pytest

from aquila_jax.evaluation.until import Continuer, Prompt, cut, fit
from aquila_jax.generation import decoding
from aquila_jax.generation.sampling import Sampling
from tests.evaluation import tiny_lm

NEW = 12
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)


def continuer(**options) -> Continuer:
  model = tiny_lm.stored()
  return Continuer(
    model.config, model.params, tokenizer=tiny_lm.tokenizer(), **options
  )


def prompts() -> list[Prompt]:
  texts = ["a stone is", "why", "", "rivers run and rivers", "石头", "x"]
  encode = tiny_lm.tokenizer().encode
  return [
    Prompt(tokens=encode(text).ids, number=i) for i, text in enumerate(texts)
  ]


def expected(ends: list[str], stops: tuple[int, ...] = ()) -> list[str]:
  texts = []
  for prompt in prompts():
    tokens = tiny_lm.greedy(prompt.tokens, NEW)
    stop = next((i for i, t in enumerate(tokens) if t in stops), NEW)
    text = tiny_lm.tokenizer().decode(tokens[:stop])
    places = [text.find(end) for end in ends if end in text]
    texts.append(text[: min(places, default=None)])
  return texts


def _ends() -> list[str]:
  """Strings of which some come up: a character here, two there."""
  texts = expected([])
  return [texts[0][3], texts[1][4:6], "not in any"]


def test_every_text_is_the_greedy_one_up_to_the_first_string():
  ends = _ends()
  found = continuer(batch_size=4)(prompts(), until=ends, sampling=GREEDY)
  assert found == expected(ends)
  assert len(set(map(len, found))) > 1
  whole = continuer()(prompts(), until=[], sampling=GREEDY)
  assert whole == expected([])


def test_stop_tokens_end_a_text():
  stops = (tiny_lm.greedy(prompts()[0].tokens, 4)[-1],)
  sampling = Sampling(max_new_tokens=NEW, temperature=0.0, stop_tokens=stops)
  found = continuer()(prompts(), until=[], sampling=sampling)
  assert found == expected([], stops)


def test_no_step_is_made_after_the_last_text_has_ended(monkeypatch):
  steps = []
  original = decoding.advance_once

  def counting(*args, **kwargs):
    steps.append(1)
    return original(*args, **kwargs)

  monkeypatch.setattr(decoding, "advance_once", counting)
  prompt = prompts()[0]
  text = tiny_lm.tokenizer().decode(tiny_lm.greedy(prompt.tokens, 3))
  continuer()([prompt], until=[text[-1]], sampling=GREEDY)
  assert 1 <= len(steps) <= 3


def test_random_texts_depend_on_seed_and_number_only():
  one = Sampling(max_new_tokens=NEW, temperature=1.0, top_k=20, seed=1)
  other = Sampling(max_new_tokens=NEW, temperature=1.0, top_k=20, seed=2)
  some = prompts()[:4]
  found = continuer()(some, until=[], sampling=one)
  assert continuer(batch_size=2)(some, until=[], sampling=one) == found
  assert continuer()(some[::-1], until=[], sampling=one) == found[::-1]
  assert continuer()(some, until=[], sampling=other) != found


def test_progress_counts_prompts():
  told = []
  continuer(batch_size=4)(
    prompts(), until=[], sampling=GREEDY, progress=told.append
  )
  assert told == [3, 6]


@pytest.mark.parametrize(
  ("text", "ends", "left"),
  [
    ("one. two\n\nQ: x", ["\n\n"], "one. two"),
    ("one. two", ["w", "."], "one"),
    ("one", [], "one"),
    ("one", ["", "x"], "one"),
    ("Q: one", ["Q:"], ""),
  ],
)
def test_cut_by_hand(text, ends, left):
  assert cut(text, ends) == left


def test_fit_by_hand():
  ids = list(range(10))
  assert fit(ids, max_new_tokens=4, max_length=20) == (ids, 4)
  # The context loses its beginning.
  assert fit(ids, max_new_tokens=4, max_length=10) == (ids[4:], 4)
  assert fit(ids, max_new_tokens=9, max_length=10) == ([9], 9)
  # More is asked for than the model reads.
  assert fit(ids, max_new_tokens=256, max_length=8) == (ids[6:], 4)


def test_a_string_is_found_with_its_last_token():
  made = continuer()
  tokens = tiny_lm.tokenizer().encode("rivers run 石头 x").ids
  for end in ("rs r", "run 石", "石头", "头"):
    found = [made._has_ended(tokens[:i], [end]) for i in range(len(tokens))]
    text = tiny_lm.tokenizer().decode(tokens[: found.index(True)])
    assert text.endswith(end), end
  assert not made._has_ended(tokens, ["stone", ""])
