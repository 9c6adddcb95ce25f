from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from aquila_jax.core.types import Batch
from aquila_jax.data import rows


def _pieces(*lists: list[int]) -> list[np.ndarray]:
  return [np.array(tokens, np.uint16) for tokens in lists]


def _assert_row(row: Batch, **expected: list[Any]):
  assert set(expected) == {field.name for field in dataclasses.fields(Batch)}
  for name, values in expected.items():
    assert getattr(row, name).tolist() == values, name


def test_a_full_row():
  row = rows.pack(_pieces([7, 8, 9], [7, 5], [6]), language=2)
  _assert_row(
    row,
    tokens=[7, 8, 9, 7, 5],
    targets=[8, 9, 7, 5, 6],
    # 9 -> 7 and 5 -> 6 lead into another document.
    weights=[1, 1, 0, 1, 0],
    segments=[1, 1, 1, 2, 2],
    positions=[0, 1, 2, 0, 1],
    languages=[2, 2, 2, 2, 2],
  )
  assert row.weights.dtype == np.float32
  for name in ("tokens", "targets", "segments", "positions", "languages"):
    assert getattr(row, name).dtype == np.int32, name


def test_a_short_row_is_padded():
  row = rows.pack(_pieces([7, 8, 9], [4, 5]), language=1, length=6)
  # The last token, 5, is only a target.
  assert row.weights.tolist() == [1, 1, 0, 1, 0, 0]
  assert row.segments.tolist() == [1, 1, 1, 2, 0, 0]
  assert row.positions.tolist() == [0, 1, 2, 0, 0, 0]
  assert row.languages.tolist() == [1] * 6
  real = row.segments > 0
  assert row.tokens[real].tolist() == [7, 8, 9, 4]
  assert row.targets[real].tolist() == [8, 9, 4, 5]


def test_a_row_of_length_t_with_t_plus_1_tokens_has_no_padding():
  pieces = _pieces([7, 8, 9], [4])
  short = rows.pack(pieces, language=0, length=3)
  full = rows.pack(pieces, language=0)
  for field in dataclasses.fields(Batch):
    values = [getattr(row, field.name).tolist() for row in (short, full)]
    assert values[0] == values[1], field.name
  assert short.segments.tolist() == [1, 1, 1]


@pytest.mark.parametrize("pieces", [[], [[7]]])
def test_a_row_without_a_target_is_padding(pieces):
  row = rows.pack(_pieces(*pieces), language=3, length=4)
  assert row.weights.tolist() == [0] * 4
  assert row.segments.tolist() == [0] * 4
  assert row.positions.tolist() == [0] * 4
  assert row.languages.tolist() == [3] * 4


def test_rows_are_stacked():
  first = rows.pack(_pieces([1, 2, 3]), language=0)
  second = rows.pack(_pieces([4], [5, 6]), language=1)
  batch = rows.stack([first, second])
  _assert_row(
    batch,
    tokens=[[1, 2], [4, 5]],
    targets=[[2, 3], [5, 6]],
    weights=[[1, 1], [0, 1]],
    segments=[[1, 1], [1, 2]],
    positions=[[0, 1], [0, 0]],
    languages=[[0, 0], [1, 1]],
  )


@pytest.mark.parametrize(
  ("documents", "length", "expected"),
  [
    # The last token of a cut stands in both rows.
    ([[1, 2, 3, 4, 5]], 2, [[[1, 2, 3]], [[3, 4, 5]]]),
    ([[1, 2, 3, 4]], 2, [[[1, 2, 3]], [[3, 4]]]),
    # A row that ends with a document is not repeated.
    ([[1, 2, 3], [4, 5]], 2, [[[1, 2, 3]], [[4, 5]]]),
    ([[1, 2], [3, 4]], 2, [[[1, 2], [3]], [[3, 4]]]),
    ([[1], [2], [3, 4]], 3, [[[1], [2], [3, 4]]]),
    ([], 2, []),
  ],
)
def test_documents_are_cut_into_rows(documents, length, expected):
  found = rows.cut(_pieces(*documents), length)
  assert [[piece.tolist() for piece in row] for row in found] == expected


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_every_token_but_a_documents_first_is_a_target_once(length):
  generator = np.random.default_rng(length)
  sizes = generator.integers(1, 20, 30)
  # The i-th token of document d is 100 * d + i.
  documents = [100 * d + np.arange(size) for d, size in enumerate(sizes)]
  counts: Counter[int] = Counter()
  for pieces in rows.cut(documents, length):
    assert sum(map(len, pieces)) <= length + 1
    row = rows.pack(pieces, language=0, length=length)
    counts.update(row.targets[row.weights > 0].tolist())
    # The input of a target is the token before it, in the same document.
    weighted = row.weights > 0
    assert np.array_equal(row.targets[weighted], row.tokens[weighted] + 1)
  expected = {100 * d + i for d, n in enumerate(sizes) for i in range(1, n)}
  assert counts == Counter(expected)
