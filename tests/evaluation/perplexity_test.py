"""Losses of held-out text, against a plain loop over the documents."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.evaluation import perplexity
from aquila_jax.evaluation.perplexity import Evaluator, evaluate
from aquila_jax.models import decoder_lm
from aquila_jax.models.target_nats import target_nats
from tests.evaluation import tiny

# float32 losses of about 5 nats, sums of 16 to 260 terms: some ten roundings
# of 6e-8 each.
RTOL = 3e-6


def config(*, moe: bool = False) -> ModelConfig:
  fields: dict[str, Any] = {}
  if moe:
    # A capacity that drops by what else is in the batch, were it not ignored.
    fields["moe"] = MoeConfig(
      num_experts=4, block_size=4, router_init_std=1.0, capacity_factor=0.3
    )
  return ModelConfig(
    vocab_size=264,
    num_layers=1,
    embed_dim=16,
    mlp_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=128,
    init_std=0.2,
    compute_dtype="float32",
    **fields,
  )


@functools.cache
def params(*, moe: bool = False):
  init = jax.jit(functools.partial(decoder_lm.init_params, config(moe=moe)))
  return init(key=jax.random.key(0))


@pytest.fixture(scope="module")
def data():
  return tiny.prepared(tiny.TEXTS)


@jax.jit
def _logits(params, row):
  out: Any = decoder_lm.DecoderLM(config()).apply(
    {"params": params},
    row,
    positions=jnp.arange(row.shape[1])[None],
    segments=jnp.ones_like(row),
  )
  return out.logits


def nats_of_document(tokens: np.ndarray) -> float:
  """-log p of every token but the first, the document alone in the model."""
  row = np.asarray(tokens, np.int32)[None]
  logits = np.asarray(_logits(params(), row)[0], np.float64)
  total = 0.0
  for t in range(len(tokens) - 1):
    normaliser = math.log(sum(math.exp(x) for x in logits[t]))
    total += normaliser - logits[t][tokens[t + 1]]
  return total


def test_scores_are_those_of_each_document_alone(data):
  scores = evaluate(
    config(), params(), data=data, split="test", sequence_length=128
  )
  assert scores.split == "test"
  assert list(scores.languages) == ["en", "zh"]
  for language, score in scores.languages.items():
    store = data.sources[language].splits["test"]
    documents = [
      store.read(i, 0, int(store.lengths[i])) for i in range(len(store.lengths))
    ]
    expected = sum(map(nats_of_document, documents))
    assert score.tokens == sum(len(tokens) - 1 for tokens in documents)
    assert score.bytes == sum(len(t.encode()) for t in tiny.TEXTS[language])
    np.testing.assert_allclose(score.nats, expected, rtol=RTOL)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_batch_size_changes_nothing(data, moe):
  # Rows of 16: documents are cut, and the last batch is part padding.
  found = [
    evaluate(
      config(moe=moe),
      params(moe=moe),
      data=data,
      split="test",
      sequence_length=16,
      batch_size=batch_size,
    )
    for batch_size in (1, 8)
  ]
  for language in tiny.TEXTS:
    one, eight = (scores.languages[language] for scores in found)
    assert (one.tokens, one.bytes) == (eight.tokens, eight.bytes)
    np.testing.assert_allclose(one.nats, eight.nats, rtol=RTOL)


def test_padding_never_counts():
  batch = tiny_batch(weights=[1.0, 1.0, 0.0, 0.0])
  nats = target_nats(config(), params(), batch)
  assert np.asarray(nats)[0, 2:].tolist() == [0.0, 0.0]
  assert (np.asarray(nats)[0, :2] > 0).all()


def tiny_batch(*, weights: list[float]):
  row = np.asarray([[1, 2, 3, 4]], np.int32)
  arrays: dict[str, Any] = dict(
    tokens=row,
    targets=row,
    weights=np.asarray([weights], np.float32),
    segments=np.ones_like(row),
    positions=np.arange(4, dtype=np.int32)[None],
    languages=np.zeros_like(row),
  )
  return perplexity.Batch(**arrays)


def test_an_evaluator_compiles_once_and_gives_a_validation_row(data):
  evaluator = Evaluator(
    config(), data=data, split="test", batch_size=2, sequence_length=24
  )
  program: Any = target_nats
  program.clear_cache()
  row = evaluator(params())
  other = evaluator(jax.tree.map(lambda leaf: 1.1 * leaf, params()))
  assert program._cache_size() == 1
  assert row["loss"] != other["loss"]
  scores = evaluator.scores(params())
  assert row == {
    "loss": scores.overall.loss,
    "bits_per_byte": scores.overall.bits_per_byte,
    "loss_en": scores.languages["en"].loss,
    "bits_per_byte_en": scores.languages["en"].bits_per_byte,
    "loss_zh": scores.languages["zh"].loss,
    "bits_per_byte_zh": scores.languages["zh"].bits_per_byte,
    "validation_tokens": float(scores.overall.tokens),
  }


def test_max_tokens_limits_each_language(data):
  scores = evaluate(
    config(),
    params(),
    data=data,
    split="test",
    sequence_length=16,
    max_tokens=12,
  )
  for score in scores.languages.values():
    assert 0 < score.tokens <= 12


def test_rows_spread_over_devices_give_the_same(data):
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  fields: dict[str, Any] = dict(
    data=data, split="test", batch_size=4, sequence_length=16
  )
  spread = Evaluator(
    config(),
    sharding=NamedSharding(mesh, PartitionSpec("data")),
    **fields,
  )
  here = Evaluator(config(), **fields)
  np.testing.assert_allclose(
    spread(params())["loss"], here(params())["loss"], rtol=RTOL
  )


def test_a_language_without_text_is_left_out():
  texts = {"en": tiny.TEXTS["en"], "zh": []}
  scores = evaluate(
    config(),
    params(),
    data=tiny.prepared(texts),
    split="test",
    sequence_length=128,
  )
  assert list(scores.languages) == ["en"]
  assert scores.overall == scores.languages["en"]


def test_refuses_a_split_without_any_text(data):
  with pytest.raises(errors.UserError) as caught:
    evaluate(
      config(), params(), data=data, split="validation", sequence_length=16
    )
  assert str(caught.value) == (
    "the validation split has no text; raise data.validation_share or give"
    " more documents"
  )
