"""Rows: pieces of documents packed one after another, and their targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from aquila_jax.core.types import Batch


def pack(
  pieces: Sequence[np.ndarray], *, language: int, length: int | None = None
) -> Batch:
  """One row of T tokens from up to T + 1.

  Args:
    pieces: consecutive tokens of documents; each piece is of another one. The
      last token of all is only a target.
    language: index of the row's language.
    length: T; the rest of the row is padding. None is as many as there are.

  Returns:
    A batch without the axis B, arrays [T]. Segments count the pieces from 1,
    positions restart in each, and a target of another document has weight 0.
  """
  sizes = [len(piece) for piece in pieces]
  total = sum(sizes)
  width = total if length is None else length + 1
  tokens = np.zeros(width, np.int32)
  segments = np.zeros(width, np.int32)
  positions = np.zeros(width, np.int32)
  start = 0
  for number, piece in enumerate(pieces, start=1):
    stop = start + len(piece)
    tokens[start:stop] = piece
    segments[start:stop] = number
    positions[start:stop] = np.arange(len(piece))
    start = stop
  followed = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
  if total < width:
    # A short row ends where the text does: its last token has no target, and
    # as an input it would predict nothing.
    last = max(total - 1, 0)
    segments[last:] = 0
    positions[last:] = 0
  fields: dict[str, Any] = dict(
    tokens=tokens[:-1],
    targets=tokens[1:],
    weights=followed.astype(np.float32),
    segments=segments[:-1],
    positions=positions[:-1],
    languages=np.full(width - 1, language, np.int32),
  )
  return Batch(**fields)


def stack(packed: Sequence[Batch]) -> Batch:
  """Rows [T] to a batch [B, T]."""
  fields: dict[str, Any] = {
    field.name: np.stack([getattr(row, field.name) for row in packed])
    for field in dataclasses.fields(Batch)
  }
  return Batch(**fields)


def cut(
  documents: Iterable[np.ndarray], length: int
) -> Iterator[list[np.ndarray]]:
  """Cuts documents into rows of at most `length` + 1 tokens.

  Where a document is cut, the last token of the row is also the first of the
  next, so that every token of a document but its first is a target once.

  Args:
    documents: one after another.
    length: T.

  Yields:
    The pieces of a row, each of another document.
  """
  row: list[np.ndarray] = []
  room = length + 1
  for document in documents:
    start = 0
    while start < len(document):
      piece = document[start : start + room]
      row.append(piece)
      room -= len(piece)
      start += len(piece)
      if not room:
        yield row
        row, room = [], length + 1
        if start < len(document):
          start -= 1
  if row:
    yield row
