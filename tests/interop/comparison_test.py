"""What counts as agreement, on implementations that are written out here."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.interop import comparison, tracing
from aquila_jax.interop.comparison import Continuation, OurModel
from aquila_jax.models import decoder_lm

CONFIG = ModelConfig(
  vocab_size=7,
  num_layers=1,
  embed_dim=4,
  mlp_dim=6,
  num_heads=2,
  num_kv_heads=1,
  head_dim=2,
  init_std=0.8,
  compute_dtype="float32",
)
TEXT = [3, 1, 4]


@functools.cache
def _params():
  return decoder_lm.init_params(CONFIG, key=jax.random.key(0))


def _continue(ours: OurModel, tokens, count):
  """Greedy, without a cache."""
  row = list(tokens)
  for _ in range(count):
    row.append(int(ours.logits(row)[-1].argmax()))
  return row[len(tokens) :]


OURS = OurModel(config=CONFIG, params=_params(), continuation=_continue)


@dataclasses.dataclass
class Other:
  """Ours with something added to the logits at some places."""

  added: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
  vocab_size: int = 7
  num_layers: int = 1

  def logits(self, tokens):
    logits = OURS.logits(tokens).copy()
    for place, value in self.added.items():
      if place < len(logits):
        logits[place] += value
    return logits

  def continuation(self, tokens, *, count):
    row = list(tokens)
    for _ in range(count):
      row.append(int(self.logits(row)[-1].argmax()))
    return row[len(tokens) :]

  def trace(self, tokens):
    return tracing.trace_model(CONFIG, _params(), tokens)


def _compare(other, *, tolerance=1e-3, count=5, texts=(TEXT,)):
  return comparison.compare(
    OURS,
    texts,
    reference=other,
    tolerance=tolerance,
    continue_tokens=count,
  )


def _swap(place: int, *, by: float) -> np.ndarray:
  """What makes the second best logit at a place best, by so much."""
  row = OURS.logits(TEXT + _continue(OURS, TEXT, 5))[place]
  best, second = np.argsort(row)[::-1][:2]
  added = np.zeros(7, np.float32)
  added[second] = row[best] - row[second] + by
  return added


def test_the_same_agrees():
  found = _compare(Other())
  (text,) = found.texts
  assert found.failures == []
  assert found.largest_difference == 0
  assert text.num_tokens == 3
  assert text.num_logits == 8
  # Gaps of random logits of size 1: none is below 2e-3.
  assert text.decided == text.same_best == 8
  assert text.continuation == Continuation(asked=5, same=5, gap=None)


def test_without_a_continuation_the_text_alone_counts():
  (text,) = _compare(Other(), count=0).texts
  assert text.num_logits == 3
  assert text.continuation == Continuation(asked=0, same=0, gap=None)


def test_one_logit_that_differs_too_much_is_said():
  added = np.zeros(7, np.float32)
  added[np.argmin(OURS.logits(TEXT)[1])] = 2e-3
  found = _compare(Other({1: added}), texts=[[5], TEXT], count=0)
  assert found.failures == [
    "text 2: logits differ by 2.0e-03; expected at most 1.0e-03"
  ]
  assert _compare(Other({1: added}), tolerance=3e-3).failures == []


def test_another_best_token_is_said():
  found = _compare(Other({1: _swap(1, by=0.5)}), count=0)
  assert found.failures[1:] == [
    "text 1: 1 of 3 decided tokens have another best token"
  ]


def test_another_continuation_is_said():
  # The third token of the continuation is chosen at place 3 - 1 + 2.
  found = _compare(Other({4: _swap(4, by=0.5)}))
  (text,) = found.texts
  assert text.continuation.same == 2
  assert text.continuation.gap == pytest.approx(0.5, rel=1e-5)
  assert found.failures[-1] == (
    "text 1: the continuations part after 2 tokens, where the two best logits"
    " are 5.0e-01 apart"
  )


def test_what_is_not_decided_may_part():
  """Two best logits nearer than twice the tolerance: either may be chosen."""
  swap = _swap(4, by=1e-4)
  tolerance = float(swap.max())  # of the logits, so that this is no failure
  found = _compare(Other({4: swap}), tolerance=tolerance)
  (text,) = found.texts
  assert text.continuation.same == 2
  assert text.continuation.gap == pytest.approx(1e-4, rel=0.01)
  assert text.decided < text.num_logits
  assert found.failures == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_never_agree(value):
  added = np.zeros(7, np.float32)
  added[2] = value
  found = _compare(Other({0: added}), count=0)
  assert not found.largest_difference <= 1e30
  assert found.failures[0] == (
    f"text 1: logits differ by {value}; expected at most 1.0e-03"
  )


def test_json_says_the_verdict():
  tree = _compare(Other(), count=1).to_json()
  assert tree == {
    "tolerance": 1e-3,
    "agree": True,
    "failures": [],
    "largest_difference": 0.0,
    "texts": [
      {
        "num_tokens": 3,
        "largest_difference": 0.0,
        "num_logits": 4,
        "decided": 4,
        "same_best": 4,
        "continuation": {"asked": 1, "same": 1, "gap": None},
      }
    ],
  }


def test_best_gaps():
  logits = np.array([[1.0, 5.0, 3.5], [2.0, -1.0, 2.0], [0.0, -7.0, -4.0]])
  np.testing.assert_array_equal(comparison.best_gaps(logits), [1.5, 0, 4])


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_padding_changes_no_logit(length):
  tokens = (TEXT * 6)[:length]
  row = jnp.asarray(tokens)[None]
  out = jax.jit(decoder_lm.DecoderLM(CONFIG).apply)(
    {"params": _params()},
    row,
    positions=jnp.arange(length)[None],
    segments=jnp.ones_like(row),
  )
  found = OURS.logits(tokens)
  assert found.shape == (length, 7)
  # Logits of a few units, some ten roundings of 6e-8 relative.
  np.testing.assert_allclose(
    found,
    out.logits[0],  # pyright: ignore[reportAttributeAccessIssue]
    atol=5e-6,
  )


def test_a_model_is_compared_in_float32_and_dropless():
  config = dataclasses.replace(
    CONFIG,
    remat="full",
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
    moe=MoeConfig(num_experts=2, top_k=1, capacity_factor=1.0),
  )
  params = decoder_lm.init_params(config, key=jax.random.key(0))
  found, wide = comparison.in_float32(
    StoredModel(config=config, lineage=Lineage(), params=params, tokenizer=None)
  )
  assert found == dataclasses.replace(
    config,
    remat="none",
    param_dtype="float32",
    compute_dtype="float32",
    moe=MoeConfig(num_experts=2, top_k=1, capacity_factor=None),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)),
    wide,
    params,
  )


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (
      Other(vocab_size=8),
      "the reference has vocab_size=8, the MODEL 7; they are not the same"
      " model",
    ),
    (
      Other(num_layers=3),
      "the reference has num_layers=3, the MODEL 1; they are not the same"
      " model",
    ),
  ],
)
def test_other_sizes_are_refused(other, message):
  comparison.check_same_shape(CONFIG, Other())
  with pytest.raises(errors.UserError) as refused:
    comparison.check_same_shape(CONFIG, other)
  assert str(refused.value) == message


def test_the_standing_texts_differ_in_kind():
  joined = "".join(comparison.TEXTS)
  assert any(character.isdigit() for character in joined)
  assert any(ord(character) > 0xFFFF for character in joined)
  assert "\n" in joined
