"""Scores of continuations, against one unpadded row a request."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.evaluation import token_scoring
from aquila_jax.evaluation.token_scoring import (
  Scorer,
  Shape,
  shape_for,
  windows,
)
from aquila_jax.models import causality, decoder_lm

VOCAB = 40
# float32 log-probabilities of about 4 nats, each some ten roundings of 6e-8,
# summed over up to 300 tokens.
RTOL = 3e-6


def config(kind: str) -> ModelConfig:
  fields: dict[str, Any] = {
    "dense": {},
    "window": {"sliding_window": 20, "tied_embeddings": True},
    # A capacity that drops by what else is in the batch, were it not ignored.
    "moe": {
      "moe": MoeConfig(
        num_experts=4, block_size=4, router_init_std=1.0, capacity_factor=0.3
      )
    },
  }[kind]
  return ModelConfig(
    vocab_size=VOCAB,
    num_layers=2,
    embed_dim=16,
    mlp_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=300,
    init_std=0.3,
    compute_dtype="float32",
    **fields,
  )


@functools.cache
def params(kind: str):
  init = jax.jit(functools.partial(decoder_lm.init_params, config(kind)))
  return init(key=jax.random.key(1))


def ids(seed: int, count: int) -> list[int]:
  return np.random.default_rng(seed).integers(VOCAB, size=count).tolist()


@functools.partial(jax.jit, static_argnames="config")
def _logits(config, params, row):
  out: Any = decoder_lm.DecoderLM(
    dataclasses.replace(
      config,
      moe=config.moe and dataclasses.replace(config.moe, capacity_factor=None),
    )
  ).apply(
    {"params": params},
    row,
    positions=jnp.arange(row.shape[1])[None],
    segments=jnp.ones_like(row),
  )
  return out.logits


def naive(kind: str, context: list[int], continuation: list[int], limit: int):
  """One token after the other would be slower, and no plainer."""
  total, greedy, done = 0.0, True, 0
  while done < len(continuation):
    part = continuation[done : done + limit]
    read = (context + continuation[: done + len(part) - 1])[-limit:]
    # Rows of few widths, so that few programs are compiled; what stands to the
    # right of a token has no influence on it.
    row = np.zeros((1, -(-len(read) // 64) * 64), np.int32)
    row[0, : len(read)] = read
    logits = np.asarray(_logits(config(kind), params(kind), row))[0]
    logits = logits[len(read) - len(part) : len(read)].astype(np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    total += sum(log_probs[i, token] for i, token in enumerate(part))
    greedy &= np.argmax(logits, -1).tolist() == part
    done += len(part)
  return total, greedy


def requests() -> list[tuple[list[int], list[int]]]:
  shared = ids(1, 30)
  made = [(shared, ids(10 + i, n)) for i, n in enumerate((1, 1, 4, 20, 33))]
  made += [(ids(2, 100), ids(3, 5)), (ids(4, 3), ids(5, 130))]  # not together
  made += [([7], ids(6, 1)), (ids(7, 2), ids(8, 2)), (shared, [])]
  return made + [(ids(9, 290), ids(10, 60)), ([3], ids(11, 700))]


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("kind", ["dense", "window", "moe"])
def test_every_score_is_that_of_the_request_alone(kind):
  scorer = Scorer(config(kind), params(kind), batch_size=8)
  some = requests() if kind == "dense" else requests()[2:6]
  found = scorer(some)
  expected = [naive(kind, *request, limit=300) for request in some]
  np.testing.assert_allclose(
    [score.log_prob for score in found],
    [log_prob for log_prob, _ in expected],
    rtol=RTOL,
  )
  assert [score.is_greedy for score in found] == [g for _, g in expected]


def test_the_most_probable_continuation_is_greedy():
  context, made = ids(12, 9), []
  for _ in range(6):
    row = np.asarray([context + made], np.int32)
    logits = _logits(config("dense"), params("dense"), row)
    made.append(int(np.argmax(logits[0, -1])))
  scorer = Scorer(config("dense"), params("dense"))
  other = [*made[:-1], (made[-1] + 1) % VOCAB]
  found = scorer([(context, made), (context, other), (context, made[:2])])
  assert [score.is_greedy for score in found] == [True, False, True]


def test_batch_and_order_change_nothing():
  alone = Scorer(config("dense"), params("dense"), batch_size=1)
  together = Scorer(config("dense"), params("dense"), batch_size=32)
  some = requests()[:5]
  found, backwards = alone(some), together(some[::-1])[::-1]
  for one, other in zip(found, backwards, strict=True):
    assert one.log_prob == pytest.approx(other.log_prob, rel=RTOL)
    assert one.is_greedy == other.is_greedy


def test_a_head_is_read_once_for_all_its_continuations(monkeypatch):
  read = []
  original = token_scoring.read_prefixes

  def counting(*args, **kwargs):
    read.extend(args[2])
    return original(*args, **kwargs)

  monkeypatch.setattr(token_scoring, "read_prefixes", counting)
  context = ids(1, 30)
  Scorer(config("dense"), params("dense"))(
    [(context, [1, 2]), (ids(2, 30), [1]), (context, [3]), (context, [4])]
  )
  assert sorted(map(len, read)) == [29, 29]


@pytest.mark.parametrize("kind", ["dense", "window"])
def test_what_all_contexts_begin_with_may_be_read_once(kind):
  common = ids(20, 45)
  some = [(common + ids(21 + i, 3 * i), ids(30 + i, 3)) for i in range(4)]
  found = Scorer(config(kind), params(kind))(some)
  expected = [naive(kind, *request, limit=300) for request in some]
  np.testing.assert_allclose(
    [score.log_prob for score in found],
    [log_prob for log_prob, _ in expected],
    rtol=RTOL,
  )


def test_common_beginnings_by_hand():
  common = token_scoring._common_length
  assert common([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
  assert common([(5,), (6, 5)]) == 0
  assert common([(), (6, 5)]) == 0
  assert common([(6, 5), (6, 5)]) == 2


def test_progress_counts_whole_requests():
  told = []
  scorer = Scorer(config("dense"), params("dense"), batch_size=1)
  # Of one shape; the second is cut into two windows.
  some = [([3], ids(1, 300)), ([3], ids(2, 301)), ([4], ids(3, 300))]
  scorer(some, progress=told.append)
  assert told == sorted(told)
  assert told[-1] == 3


def test_windows_by_hand():
  def cut(context, continuation):
    return list(windows(context, continuation, max_length=4))

  # All tokens fit: 4 are read, the fifth is predicted.
  assert cut([1, 2], [3, 4, 5]) == [([1, 2], [3, 4, 5])]
  # The context loses its beginning.
  assert cut([0, 1, 2], [3, 4, 5]) == [([1, 2], [3, 4, 5])]
  assert cut([0, 1, 2, 3, 4], [5]) == [([1, 2, 3, 4], [5])]
  # The example of the harness's loglikelihood_rolling, 9 in front of 0.
  assert cut([9], [0, 1, 2, 3, 4, 5, 6, 7, 8]) == [
    ([9], [0, 1, 2, 3]),
    ([3], [4, 5, 6, 7]),
    ([4, 5, 6, 7], [8]),
  ]
  assert cut([9], []) == []


def test_shapes_hold_what_they_are_for():
  for head in (0, 1, 15, 16, 100, 127, 128, 500, 2047, 8000):
    for tail in (1, 8, 9, 64, 65, 300, 2048):
      shape = shape_for(head, tail, batch_size=32, vocab_size=49_152)
      assert shape.head_width(head) >= head
      assert shape.tail_width(tail) >= tail
      assert shape.head_width(head) + shape.tail_width(tail) <= shape.slots
      assert 1 <= shape.rows <= 32
      assert shape.rows == 1 or shape.rows * shape.size <= 16_384
  sizes = {
    shape_for(head, 1, batch_size=1, vocab_size=9).size
    for head in range(1, 1000)
  }
  assert sizes == {128, 192, 256, 384, 512, 768, 1024}
  # A head as long as the context needs no more than a short tail on top.
  assert shape_for(2047, 1, batch_size=1, vocab_size=9).slots == 2112


def test_rows_come_in_steps_of_four():
  shape = Shape(rows=30, size=128, tail_piece=8)
  found = [shape.with_rows(rows).rows for rows in (1, 4, 5, 29, 30, 31)]
  assert found == [4, 4, 8, 30, 30, 30]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size=0: need >= 1"),
    ({"max_length": -1}, "max_length=-1: need >= 1; 0 is the model's context"),
  ],
)
def test_mistakes_are_refused(options, message):
  with pytest.raises(errors.UserError) as raised:
    Scorer(config("dense"), params("dense"), **options)
  assert str(raised.value) == message


def test_experts_that_choose_are_warned_of(caplog):
  moe = MoeConfig(
    num_experts=4,
    choice="expert",
    router_order="sigmoid",
    renormalise=False,
  )
  given = dataclasses.replace(config("dense"), moe=moe)
  causality._warn.cache_clear()
  with caplog.at_level("WARNING", logger="absl"):
    Scorer(given, params("dense"))
    Scorer(given, params("dense"))
    Scorer(config("dense"), params("dense"))
  assert [record.message for record in caplog.records] == [
    "scores of tasks: model.moe.choice='expert' is not causal: experts choose"
    " among all tokens of a batch, later ones included; losses and scores know"
    " the future"
  ]
