"""The harness's model; what needs lm_eval is skipped where it is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import pytest

from aquila_jax.core import errors
from aquila_jax.evaluation import harness
from aquila_jax.evaluation.harness import Answers, Options
from tests.evaluation import tiny_lm

# float32 against float64 over some ten roundings of 6e-8 each.
RTOL = 3e-6
END = 0  # of the tiny tokenizer

needs_lm_eval = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)


def encode(text: str) -> list[int]:
  return tiny_lm.tokenizer().encode(text).ids


def answers(**options) -> Answers:
  return Answers(tiny_lm.stored(), Options(**options))


def test_scores_are_those_of_the_rows_alone():
  requests = [
    (encode("a stone"), encode("why")[1:]),
    ([], encode("rivers")[1:]),
    (encode("x" * 80), encode("xy")[1:]),  # longer than the context
    (encode("a stone"), []),
  ]
  expected = [
    tiny_lm.log_prob(context or [END], continuation) if continuation else 0.0
    for context, continuation in requests
  ]
  found = answers().scores(requests)
  assert [score for score, _ in found] == pytest.approx(expected, rel=RTOL)
  assert found[3] == (0.0, True)


def test_rolling_texts_are_scored_after_the_prefix_token():
  texts = ["a stone is a stone", "", "rivers run " * 20]
  found = answers().rolling(texts)
  assert found[0] == pytest.approx(
    tiny_lm.log_prob([END], encode(texts[0])), rel=RTOL
  )
  # The empty text is the token that the tokenizer puts in front of every one.
  assert found[1] == pytest.approx(tiny_lm.log_prob([END], [END]), rel=RTOL)
  ids, size = encode(texts[2]), tiny_lm.CONFIG.context_length
  assert len(ids) > 2 * size
  windows = [([END], ids[:size])]
  windows += [
    (ids[:start], ids[start : start + size])
    for start in range(size, len(ids), size)
  ]
  assert found[2] == pytest.approx(
    sum(tiny_lm.log_prob(*window) for window in windows), rel=RTOL
  )


def options(**fields) -> dict[str, Any]:
  """As the harness normalises them."""
  return {
    "until": [],
    "max_gen_toks": 8,
    "do_sample": False,
    "temperature": 0.0,
  } | fields


def test_continuations_follow_their_options():
  def greedy(text: str, count: int) -> str:
    return tiny_lm.tokenizer().decode(tiny_lm.greedy(encode(text), count))

  end = greedy("why", 8)[4]
  found = answers().continuations(
    [
      ("a stone", options()),
      ("why", options(until=[end])),
      ("why", options(max_gen_toks=3, num_beams=1)),
      # The temperature has no effect where nothing is sampled.
      ("a stone", options(temperature=1.0, top_p=None)),
    ]
  )
  assert found == [
    greedy("a stone", 8),
    greedy("why", 8).split(end)[0],
    greedy("why", 3),
    greedy("a stone", 8),
  ]


def test_a_context_loses_its_beginning_where_it_leaves_no_room():
  text = "rivers run and " * 8
  size = tiny_lm.CONFIG.context_length
  assert len(encode(text)) > size
  decode = tiny_lm.tokenizer().decode
  ten, many = answers().continuations(
    [
      (text, options(max_gen_toks=10)),
      (text, options(max_gen_toks=1000)),
    ]
  )
  assert ten == decode(tiny_lm.greedy(encode(text)[-(size - 10) :], 10))
  half = size // 2
  assert many == decode(tiny_lm.greedy(encode(text)[-half:], half))


def test_options_that_would_change_the_text_are_refused():
  with pytest.raises(errors.UserError) as raised:
    answers().continuations([("why", options(num_beams=4))])
  assert str(raised.value) == (
    "generation_kwargs.num_beams=4: is not supported; supported: do_sample,"
    " max_gen_toks, temperature, top_k, top_p, until"
  )


def test_sampled_texts_differ_where_a_request_is_repeated():
  asked = options(do_sample=True, temperature=1.0, max_gen_toks=16)
  found = answers().continuations([("why", asked)] * 3)
  assert len(set(found)) == 3
  assert answers().continuations([("why", asked)] * 3) == found
  assert answers(seed=1).continuations([("why", asked)] * 3) != found


def test_progress_says_how_long_the_rest_takes(monkeypatch):
  said, clock = [], iter([0.0, 5.0, 20.0, 25.0, 40.0])
  made = Answers(tiny_lm.stored(), Options(), say=said.append)
  monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
  tell = made._progress("scored", 1000)
  for done in (100, 500, 600, 1000):
    tell(done)
  assert said == ["scored 500 of 1,000 requests; about 20 s left"]


@pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is there"
)
def test_a_missing_lm_eval_is_named():
  with pytest.raises(errors.UserError) as raised:
    harness.model_class()
  assert str(raised.value) == (
    "tasks need the package lm_eval; install it: pip install -e .[eval]"
  )


def model(**fields: Any) -> Any:
  return harness.model_class()(model=tiny_lm.stored(), **fields)


def instances(kind: str, *arguments: tuple) -> list[Any]:
  from lm_eval.api.instance import (  # pyright: ignore[reportMissingImports]
    Instance,
  )

  return [
    Instance(request_type=kind, doc={}, arguments=one, idx=i)
    for i, one in enumerate(arguments)
  ]


@needs_lm_eval
def test_the_harness_finds_the_model_by_name():
  from lm_eval.api.registry import (  # pyright: ignore[reportMissingImports]
    get_model,
  )

  assert harness.model_class() is get_model("aquila")
  made = get_model("aquila").create_from_arg_obj(
    {"model": tiny_lm.stored(), "max_length": 32},
    {"batch_size": "auto", "device": "cpu", "max_batch_size": None},
  )
  assert (made.max_length, made.batch_size, made.max_gen_toks) == (32, 32, 256)
  assert (made.prefix_token_id, made.eot_token_id) == (END, END)
  assert made.tok_decode(made.tok_encode("why")) == "why"


@needs_lm_eval
def test_texts_are_cut_where_the_harness_cuts_them():
  found = model().loglikelihood(
    instances(
      "loglikelihood",
      ("a stone ", "why"),  # its space belongs to the continuation
      ("", "why"),
      ("", ""),
    ),
    disable_tqdm=True,
  )
  whole, context = encode("a stone why"), encode("a stone")
  assert found[0][0] == pytest.approx(
    tiny_lm.log_prob(context, whole[len(context) :]), rel=RTOL
  )
  assert found[1][0] == pytest.approx(
    tiny_lm.log_prob([END], encode("why")[1:]), rel=RTOL
  )
  assert found[2] == (0.0, True)


@needs_lm_eval
def test_answers_go_to_the_cache_of_the_harness():
  made, kept = model(), {}

  class Hook:
    def add_partial(self, kind, arguments, answer):
      kept[kind, str(arguments)] = answer

  made.set_cache_hook(Hook())
  pair, asked = ("why", " a"), ("why", {"until": ["x"], "max_gen_toks": 4})
  scores = made.loglikelihood(instances("loglikelihood", pair), True)
  rolling = made.loglikelihood_rolling(
    instances("loglikelihood_rolling", ("why",))
  )
  texts = made.generate_until(instances("generate_until", asked))
  assert kept == {
    ("loglikelihood", str(pair)): scores[0],
    ("loglikelihood_rolling", "('why',)"): rolling[0],
    ("generate_until", str(asked)): texts[0],
  }
  assert not math.isnan(rolling[0])


@needs_lm_eval
def test_conversations_are_written_by_the_template_of_the_model():
  with pytest.raises(errors.UserError) as raised:
    model().apply_chat_template([{"role": "user", "content": "why"}])
  assert str(raised.value) == (
    "the MODEL has no chat template; evaluate it without apply_chat_template"
  )
  pytest.importorskip("transformers")
  template = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %} ->{% endif %}"
  )
  stored = dataclasses.replace(tiny_lm.stored(), chat_template=template)
  made = harness.model_class()(model=stored)
  history = [{"role": "user", "content": "why"}]
  begun = "<|endoftext|>user: why"
  assert made.apply_chat_template(history) == begun + " ->"
  assert made.apply_chat_template(history, add_generation_prompt=False) == begun
  assert made.chat_template() == template
  assert made.tokenizer_name != model().tokenizer_name


@needs_lm_eval
@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"max_lenght": 3},
      "model_args='max_lenght' is unknown; did you mean 'max_length'?",
    ),
  ],
)
def test_mistakes_are_refused(options, message):
  with pytest.raises(errors.UserError) as raised:
    model(**options)
  assert str(raised.value) == message
  with pytest.raises(errors.UserError) as raised:
    harness.model_class()()
  assert str(raised.value) == "model_args: need model=MODEL"
