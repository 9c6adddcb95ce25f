"""Derived numbers, checked by hand."""

from __future__ import annotations

import json
import math

import pytest

from aquila_jax.evaluation.scores import LanguageScore, Scores
from tests.evaluation import tiny


def test_loss_perplexity_and_bits_per_byte():
  # 8 tokens of ln 4 nats are 16 bits; over 32 bytes half a bit each.
  score = LanguageScore(nats=8 * math.log(4), tokens=8, bytes=32)
  assert score.loss == pytest.approx(math.log(4), rel=1e-15)
  assert score.perplexity == pytest.approx(4, rel=1e-15)
  assert score.bits_per_byte == pytest.approx(0.5, rel=1e-15)


def test_overall_weighs_every_token_the_same():
  scores = Scores(
    split="test",
    languages={
      "en": LanguageScore(nats=30.0, tokens=10, bytes=50),
      "zh": LanguageScore(nats=150.0, tokens=30, bytes=70),
    },
  )
  assert scores.overall == LanguageScore(nats=180.0, tokens=40, bytes=120)
  assert scores.overall.loss == 4.5  # not (3 + 5) / 2


def test_a_hopeless_model_has_infinite_perplexity_and_no_error():
  score = LanguageScore(nats=1e4, tokens=10, bytes=0)
  assert (score.perplexity, score.bits_per_byte) == (math.inf, math.inf)


def test_json_keeps_what_was_measured():
  scores = tiny.scores(3.0)
  tree = json.loads(json.dumps(scores.to_json()))
  assert Scores.from_json(tree) == scores
  assert tree["overall"]["loss"] == 3.5
  assert tree["languages"]["zh"]["perplexity"] == math.exp(4.0)
