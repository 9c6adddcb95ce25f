from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.types import Batch
from aquila_jax.data import loader, token_store
from aquila_jax.data.loader import DataState, Mixture
from aquila_jax.data.prepared import PreparedData, PreparedSource, Split

_FIELDS = [field.name for field in dataclasses.fields(Batch)]
_SHIFT = 100  # token i of document d of a source is first + d * _SHIFT + i


def _documents(first: int, sizes: list[int]) -> list[list[int]]:
  """Documents in which every token tells where it is from."""
  return [
    [first + d * _SHIFT + i for i in range(size)]
    for d, size in enumerate(sizes)
  ]


def _data(**sources: tuple[str, float, dict[Split, list[list[int]]]]):
  """Data in memory: of each source the language, the weight, the splits."""
  made = {}
  for name, (language, weight, splits) in sources.items():
    stores: dict[Split, token_store.TokenStore] = {
      "train": token_store.in_memory(splits.get("train", []), 0),
      "validation": token_store.in_memory(splits.get("validation", []), 0),
      "test": token_store.in_memory(splits.get("test", []), 0),
    }
    made[name] = PreparedSource(
      name=name, language=language, weight=weight, splits=stores
    )
  return PreparedData(sources=made, tokenizer_text="", digest="", card={})


# 7 documents of 41 tokens, and 3 of 12.
_SIZES = {"a": [3, 9, 2, 11, 5, 7, 4], "b": [2, 6, 4]}


@pytest.fixture(scope="module")
def two() -> PreparedData:
  return _data(
    a=("en", 3.0, {"train": _documents(0, _SIZES["a"])}),
    b=("zh", 1.0, {"train": _documents(10_000, _SIZES["b"])}),
  )


def _batches(
  data: PreparedData, number: int, **arguments: Any
) -> list[tuple[Batch, DataState]]:
  defaults: dict[str, Any] = dict(
    state=DataState.start(data), batch_size=4, sequence_length=8, seed=0
  )
  found = loader.train_batches(data, **(defaults | arguments))
  return list(itertools.islice(found, number))


def _assert_same(found: Batch, expected: Batch):
  for name in _FIELDS:
    a, b = getattr(found, name), getattr(expected, name)
    assert a.dtype == b.dtype and a.shape == b.shape, name
    assert np.array_equal(a, b), name


def _joined(parts: list[Batch]) -> Batch:
  fields: dict[str, Any] = {
    name: np.concatenate([getattr(part, name) for part in parts])
    for name in _FIELDS
  }
  return Batch(**fields)


def _stream(batches: list[tuple[Batch, DataState]], language: int) -> list[int]:
  """The tokens of a source, its rows put together; they overlap by one."""
  tokens: list[int] = []
  for batch, _ in batches:
    for row in range(len(batch.tokens)):
      if batch.languages[row, 0] == language:
        # A row begins with the last target of the one before.
        assert not tokens or tokens[-1] == batch.tokens[row, 0]
        tokens = tokens[:-1]
        tokens += [*batch.tokens[row].tolist(), int(batch.targets[row, -1])]
  return tokens


def _document_order(tokens: list[int], sizes: list[int], first: int):
  """Reads whole documents off a stream; their numbers in order."""
  order = []
  place = 0
  while True:
    document = (tokens[place] - first) // _SHIFT
    expected = _documents(first, sizes)[document]
    found = tokens[place : place + len(expected)]
    if len(found) < len(expected):
      assert found == expected[: len(found)]
      return order
    assert found == expected
    order.append(document)
    place += len(expected)
    if place == len(tokens):
      return order


def test_a_source_is_read_whole_every_epoch_in_another_order(two):
  batches = _batches(two, 40)
  for number, (name, first) in enumerate((("a", 0), ("b", 10_000))):
    sizes = _SIZES[name]
    order = _document_order(_stream(batches, number), sizes, first)
    epochs = [
      order[i : i + len(sizes)] for i in range(0, len(order), len(sizes))
    ][:-1]
    assert len(epochs) >= 10
    for epoch in epochs:
      assert sorted(epoch) == list(range(len(sizes)))
    assert len(set(map(tuple, epochs))) > 3


def test_another_seed_is_another_order(two):
  streams = []
  for seed in range(4):
    batches = _batches(two, 20, seed=seed)
    languages = tuple(
      int(batch.languages[i, 0]) for batch, _ in batches for i in range(4)
    )
    # Two epochs, whatever the mixture has given.
    streams.append((tuple(_stream(batches, 0)[:82]), languages))
  for found in zip(*streams, strict=True):
    assert len(set(found)) == 4
  again = _batches(two, 20, seed=0)
  assert tuple(_stream(again, 0)[:82]) == streams[0][0]


def test_the_order_of_a_source_is_its_own():
  """Of its name, and not of the sources beside it."""

  def stream(**weights: float) -> list[int]:
    """Of the first source."""
    documents = _documents(0, _SIZES["a"])
    splits: dict[Split, list[list[int]]] = {"train": documents}
    data = _data(**{name: (name, w, splits) for name, w in weights.items()})
    language = data.languages.index(next(iter(weights)))
    return _stream(_batches(data, 40), language)[:82]

  alone = stream(b=1.0)
  assert len(alone) == 82
  assert stream(b=1.0, a=2.0) == stream(b=3.0, a=1.0, c=1.0) == alone
  assert stream(a=1.0) != alone


@pytest.mark.parametrize(
  "start",
  [
    DataState(rows=0, tokens={"a": 0, "b": 0}),
    # Over the end of a period of the mixture, in the midst of documents.
    DataState(rows=1011, tokens={"a": 6059, "b": 2029}),
  ],
)
@pytest.mark.parametrize("rows_read", [None, (1, 3)])
def test_a_run_goes_on_anywhere_as_if_unbroken(two, start, rows_read):
  arguments: dict[str, Any] = dict(rows_read=rows_read)
  unbroken = _batches(two, 9, state=start, **arguments)
  states = [start, *(state for _, state in unbroken)]
  for done, state in enumerate(states[:-1]):
    # As through a checkpoint.
    state = DataState.from_json(json.loads(json.dumps(state.to_json())))
    resumed = _batches(two, 9 - done, state=state, **arguments)
    for (batch, after), (expected, expected_after) in zip(
      resumed, unbroken[done:], strict=True
    ):
      _assert_same(batch, expected)
      assert after == expected_after


def test_the_state_counts_rows_and_tokens(two):
  rows, tokens = 0, {"a": 0, "b": 0}
  for batch, state in _batches(two, 30):
    rows += 4
    for language in batch.languages[:, 0]:
      tokens["ab"[language]] += 8
    assert state == DataState(rows=rows, tokens=tokens)
  assert tokens["a"] > 3 * 41 and tokens["b"] > 3 * 12
  # 41 and 12 tokens are an epoch.
  assert loader.epochs(two, DataState(rows=9, tokens={"a": 82, "b": 3})) == {
    "a": 2.0,
    "b": 0.25,
  }


@pytest.mark.parametrize(
  "parts", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 3), (1, 2)]]
)
def test_the_batch_does_not_depend_on_who_reads_its_rows(two, parts):
  whole = _batches(two, 6)
  found = [_batches(two, 6, rows_read=rows) for rows in parts]
  order = np.argsort(sum(parts, ()))
  for number, (batch, state) in enumerate(whole):
    read = _joined([batches[number][0] for batches in found])
    _assert_same(jax.tree.map(lambda leaf: leaf[order], read), batch)  # noqa: B023
    assert all(batches[number][1] == state for batches in found)


def test_the_rows_do_not_depend_on_the_batch_size(two):
  small = _joined([batch for batch, _ in _batches(two, 12, batch_size=2)])
  large = _joined([batch for batch, _ in _batches(two, 3, batch_size=8)])
  _assert_same(small, large)


def test_a_period_has_the_exact_proportions(three_sources):
  """Weights 3 : 1 : 2 of 1024 rows are 512, 170.67 -> 171 and 341.33 -> 341."""
  names = ("essays", "notes", "poems")
  length, counts = 4, []
  start = DataState.start(three_sources)
  for _ in range(3):
    batches = _batches(
      three_sources, 16, state=start, batch_size=64, sequence_length=length
    )
    end = batches[-1][1]
    assert end.rows == start.rows + loader.PERIOD
    counts.append([(end.tokens[n] - start.tokens[n]) // length for n in names])
    zh = sum(int(batch.languages[:, 0].sum()) for batch, _ in batches)
    assert zh == 341
    start = end
  assert counts == [[512, 171, 341]] * 3


@pytest.mark.parametrize(
  ("weights", "expected"),
  [
    ({"x": 5.0}, [1024]),
    ({"x": 1.0, "y": 1.0}, [512, 512]),
    # 341.33 each; the row that is left goes to the first name.
    ({"z": 1.0, "x": 1.0, "y": 1.0}, [342, 341, 341]),
    ({"x": 0.1, "y": 0.9}, [102, 922]),
    # A share of less than a row is one row.
    ({"x": 1e-9, "y": 1.0, "z": 1e-9}, [1, 1022, 1]),
  ],
)
def test_every_period_of_the_mixture_has_its_counts(weights, expected):
  mixture = Mixture(weights, seed=3)
  assert mixture.names == tuple(sorted(weights))
  rows = [mixture.source(row) for row in range(3 * loader.PERIOD)]
  periods = [rows[:1024], rows[1024:2048], rows[2048:]]
  for period in periods:
    assert [period.count(i) for i in range(len(weights))] == expected
  if len(weights) > 1:
    assert periods[0] != periods[1] != periods[2]
    assert rows != [Mixture(weights, seed=4).source(r) for r in range(3072)]


def test_rows_before_are_counted():
  mixture = Mixture({"x": 1.0, "y": 2.0, "z": 4.0}, seed=0)
  counts = [0, 0, 0]
  for row in range(2 * loader.PERIOD + 10):
    assert mixture.rows_before(row).tolist() == counts
    counts[mixture.source(row)] += 1


def test_too_many_sources_are_refused():
  weights = {f"s{i:04d}": 1.0 for i in range(1025)}
  with pytest.raises(errors.UserError) as error:
    Mixture(weights, seed=0)
  assert str(error.value) == (
    "config.data.sources: 1025 sources, at most 1024 can be mixed"
  )
  weights.popitem()
  mixture = Mixture(weights, seed=0)
  assert sorted(map(mixture.source, range(1024))) == list(range(1024))


@pytest.mark.parametrize("length", [1, 5, 8, 40])
def test_every_token_is_a_target_once_an_epoch(length):
  """41 rows of T tokens are exactly T epochs of 41 tokens."""
  sizes = _SIZES["a"]
  data = _data(a=("en", 1.0, {"train": _documents(0, sizes)}))
  batches = _batches(data, 41, batch_size=1, sequence_length=length)
  assert loader.epochs(data, batches[-1][1]) == {"a": length}
  batch = _joined([batch for batch, _ in batches])
  inputs, targets, weights = (
    getattr(batch, name).reshape(length, 41)
    for name in ("tokens", "targets", "weights")
  )
  every = [token for document in _documents(0, sizes) for token in document]
  not_first = [token for token in every if token % _SHIFT]
  for epoch in range(length):
    assert sorted(inputs[epoch].tolist()) == every
    counted = weights[epoch] == 1
    assert sorted(targets[epoch][counted].tolist()) == not_first
    assert not weights[epoch][~counted].any()


def test_positions_and_segments_follow_the_documents(two):
  for batch, _ in _batches(two, 30):
    for tokens, targets, segments, positions, weights in zip(
      batch.tokens,
      batch.targets,
      batch.segments,
      batch.positions,
      batch.weights,
      strict=True,
    ):
      # A document begins at the start of the row and where i is 0.
      segment, position = 0, 0
      for i, token in enumerate(tokens):
        begins = i == 0 or token % _SHIFT == 0
        segment, position = (
          (segment + 1, 0) if begins else (segment, position + 1)
        )
        assert (segments[i], positions[i]) == (segment, position)
        assert weights[i] == (targets[i] % _SHIFT != 0)
        assert i == len(tokens) - 1 or targets[i] == tokens[i + 1]


def test_a_row_says_its_language(two):
  for batch, _ in _batches(two, 10):
    # Languages are sorted: en, zh; the tokens of b begin at 10,000.
    assert np.array_equal(batch.languages, (batch.tokens >= 10_000).astype(int))


def test_a_prepared_document_is_framed_by_end_of_text(three_sources):
  end = three_sources.end_of_text_id
  for batch, _ in _batches(three_sources, 20, sequence_length=64):
    tokens, segments = batch.tokens, batch.segments
    ends = segments[:, 1:] != segments[:, :-1]
    assert ends.any()
    assert (tokens[:, :-1][ends] == end).all()
    assert (tokens[:, 1:][ends] == end).all()
    # And stands nowhere else.
    beside = ends[:, :-1] | ends[:, 1:]
    assert not (tokens[:, 1:-1] == end)[~beside].any()


def test_a_state_of_other_data_is_refused(two):
  state = DataState(rows=0, tokens={"b": 0, "c": 0, "a": 0})
  with pytest.raises(errors.UserError) as error:
    _batches(two, 1, state=state)
  assert str(error.value) == (
    "the data position is of sources a, b, c, the data have a, b"
  )


# Two sources in one language and one in another.
_HELD_OUT = {"a": [5, 2, 9, 3], "b": [4, 7], "c": [6, 3]}


@pytest.fixture(scope="module")
def held_out() -> PreparedData:
  documents = {
    name: _documents(10_000 * i, sizes)
    for i, (name, sizes) in enumerate(_HELD_OUT.items())
  }
  return _data(
    c=("zh", 1.0, {"test": documents["c"]}),
    b=("en", 5.0, {"test": documents["b"], "validation": documents["c"]}),
    a=("en", 1.0, {"test": documents["a"]}),
  )


def _evaluation(data: PreparedData, **arguments: Any) -> list[Batch]:
  defaults: dict[str, Any] = dict(
    split="test", language="en", batch_size=2, sequence_length=4
  )
  return list(loader.evaluation_batches(data, **(defaults | arguments)))


def _targets(batches: list[Batch]) -> list[int]:
  return [
    target
    for batch in batches
    for target in batch.targets[batch.weights > 0].tolist()
  ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("length", [1, 4, 7, 100])
def test_an_evaluation_has_every_target_once(held_out, batch_size, length):
  batches = _evaluation(held_out, batch_size=batch_size, sequence_length=length)
  expected = [
    10_000 * source + _SHIFT * d + i
    for source, name in enumerate("ab")
    for d, size in enumerate(_HELD_OUT[name])
    for i in range(1, size)
  ]
  found = _targets(batches)
  assert sorted(found) == expected
  for batch in batches:
    assert batch.tokens.shape == (batch_size, length)
    weighted = batch.weights > 0
    assert np.array_equal(batch.targets[weighted], batch.tokens[weighted] + 1)
    # Nothing is predicted in padding, and each row is one language's.
    assert not batch.weights[batch.segments == 0].any()
    assert not batch.languages.any()
  # Rows are the same however many are in a batch.
  one = _targets(_evaluation(held_out, batch_size=1, sequence_length=length))
  assert found == one


def test_an_evaluation_is_of_one_split_and_language(held_out):
  other = _evaluation(held_out, language="zh")
  expected = Counter(
    20_000 + _SHIFT * d + i for d, n in ((0, 6), (1, 3)) for i in range(1, n)
  )
  assert Counter(_targets(other)) == expected
  assert all((batch.languages == 1).all() for batch in other)
  validation = _evaluation(held_out, split="validation")
  assert Counter(_targets(validation)) == expected
  assert _evaluation(held_out, split="train") == []


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 11, 29, 30, 1000])
def test_an_evaluation_stops_after_max_tokens(held_out, max_tokens):
  # In one row of all tokens every one but the last is a position.
  whole = _evaluation(held_out, batch_size=1, sequence_length=100)[0]
  assert int((whole.segments > 0).sum()) == 30 - 1
  (part,) = _evaluation(
    held_out, batch_size=1, sequence_length=100, max_tokens=max_tokens
  )
  read = min(max_tokens, 29)
  for name in _FIELDS:
    found, expected = getattr(part, name)[0], getattr(whole, name)[0]
    if name not in ("tokens", "targets"):  # of padding, they say nothing
      assert not found[read:].any(), name
    assert np.array_equal(found[:read], expected[:read]), name


def test_a_part_of_an_evaluation_is_read_in_the_same_order(held_out):
  for length in (3, 8):
    whole = _targets(_evaluation(held_out, sequence_length=length))
    for limit in range(1, 32):
      part = _targets(
        _evaluation(held_out, sequence_length=length, max_tokens=limit)
      )
      assert part == whole[: len(part)]
      assert len(part) <= limit


def test_a_part_of_an_evaluation_samples_every_source():
  """A hundred documents a source; a tenth of the tokens has both."""
  data = _data(
    a=("en", 1.0, {"test": _documents(0, [10] * 100)}),
    b=("en", 1.0, {"test": _documents(50_000, [10] * 100)}),
  )
  found = _targets(_evaluation(data, max_tokens=200))
  share = np.mean(np.array(found) < 50_000)
  # 20 documents, of which half are expected of each: 4 deviations of 0.11.
  assert 0.06 < share < 0.94


def test_an_unknown_language_gets_the_nearest(held_out):
  with pytest.raises(errors.UserError) as error:
    _evaluation(held_out, language="eng")
  assert str(error.value) == ("language='eng' is unknown; did you mean 'en'?")
