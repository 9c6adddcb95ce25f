"""Batches of packed rows, in an order that is a pure function.

Which source the n-th row of a run takes follows from the weights, the seed
and n; where in that source it begins follows from the state at the start and
from how many rows the source has had since. Any row can be made without those
before it, so the order does not depend on how many processes read, and a run
goes on anywhere.

  stream of a source   for every epoch, its documents in an order drawn from
                       (seed, source, epoch), one after another
  row of T tokens      T + 1 tokens of one stream: inputs, and targets shifted
                       by one; the next row of that source begins T further
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from aquila_jax.core import errors
from aquila_jax.core.types import Batch
from aquila_jax.data import rows
from aquila_jax.data.prepared import PreparedData, Split
from aquila_jax.data.token_store import TokenStore

# Rows after which the mixture has its exact proportions, and is drawn anew.
PERIOD = 1024

_READ_AHEAD = 8  # batches, made by one thread


@dataclasses.dataclass(frozen=True)
class DataState:
  """Where training stands in the data: all that a checkpoint keeps of it."""

  rows: int  # read so far, by all processes together
  tokens: dict[str, int]  # of each source, counting through its epochs

  @classmethod
  def start(cls, data: PreparedData) -> DataState:
    """Before the first row."""
    return cls(rows=0, tokens=dict.fromkeys(sorted(data.sources), 0))

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, tree: Mapping[str, Any]) -> DataState:
    return cls(rows=int(tree["rows"]), tokens=dict(tree["tokens"]))


def epochs(data: PreparedData, state: DataState) -> dict[str, float]:
  """How often each source has been read, e.g. 1.5 times."""
  return {
    name: state.tokens[name] / source.tokens()
    for name, source in data.sources.items()
  }


class Mixture:
  """Which source each row takes.

  In every period of `PERIOD` rows a source has its share of them, rounded by
  largest remainders and at least one; their order is drawn for each period.

  Args:
    weights: of the sources; relative to each other.
    seed: of the order.
  """

  def __init__(self, weights: Mapping[str, float], *, seed: int):
    self.names = tuple(sorted(weights))
    self._seed = seed
    self._counts = _period_counts([weights[name] for name in self.names])
    self._pattern = functools.lru_cache(4)(self._draw)

  def _draw(self, period: int) -> Int[np.ndarray, " n"]:
    generator = np.random.default_rng((self._seed, 0, period))
    numbers = np.repeat(np.arange(len(self.names)), self._counts)
    return generator.permutation(numbers)

  def source(self, row: int) -> int:
    """The index in `names` of the source that a row takes."""
    return int(self._pattern(row // PERIOD)[row % PERIOD])

  def rows_before(self, row: int) -> Int[np.ndarray, " sources"]:
    """How many of the rows 0..row-1 each source has."""
    period, inside = divmod(row, PERIOD)
    begun = self._pattern(period)[:inside]
    return period * self._counts + np.bincount(begun, minlength=len(self.names))


def _period_counts(weights: list[float]) -> Int[np.ndarray, " sources"]:
  if len(weights) > PERIOD:
    raise errors.UserError(
      f"config.data.sources: {len(weights)} sources, at most {PERIOD} can be"
      " mixed"
    )
  shares = np.asarray(weights) / np.sum(weights) * PERIOD
  counts = np.floor(shares).astype(np.int64)
  # Stable, so that equal remainders are settled by the order of names.
  largest = np.argsort(counts - shares, kind="stable")
  counts[largest[: PERIOD - counts.sum()]] += 1
  for empty in np.flatnonzero(counts == 0):
    counts[np.argmax(counts)] -= 1
    counts[empty] = 1
  return counts


class Stream:
  """The endless token stream of one source.

  Args:
    store: its training documents.
    name: of the source; a part of the seed.
    seed: of the order of documents.
  """

  def __init__(self, store: TokenStore, *, name: str, seed: int):
    self._store = store
    # Not hash(): that differs from process to process.
    self._seed = (seed, 1, zlib.crc32(name.encode()))
    self._order = functools.lru_cache(2)(self._draw)

  def _draw(
    self, epoch: int
  ) -> tuple[Int[np.ndarray, " docs"], Int[np.ndarray, " docs+1"]]:
    """The documents of an epoch in order, and where in it each begins."""
    generator = np.random.default_rng((*self._seed, epoch))
    order = generator.permutation(self._store.num_documents)
    ends = np.cumsum(self._store.lengths[order])
    return order, np.concatenate([[0], ends]).astype(np.int64)

  def pieces(self, position: int, length: int) -> list[np.ndarray]:
    """`length` tokens from `position`, cut where a document begins."""
    found = []
    while length:
      epoch, inside = divmod(position, self._store.num_tokens)
      order, starts = self._order(epoch)
      i = int(np.searchsorted(starts, inside, side="right")) - 1
      while length and i < len(order):
        begin = inside - int(starts[i])
        end = min(int(starts[i + 1] - starts[i]), begin + length)
        found.append(self._store.read(int(order[i]), begin, end))
        taken = end - begin
        position, inside = position + taken, inside + taken
        length, i = length - taken, i + 1
    return found


class _Batches(grain.sources.RandomAccessDataSource):
  """The batches of a run by their number: what Grain reads ahead from."""

  def __init__(
    self,
    data: PreparedData,
    *,
    state: DataState,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows_read: Sequence[int],
  ):
    self._state = state
    self._batch_size = batch_size
    self._length = sequence_length
    self._local = rows_read
    names = sorted(data.sources)
    weights = {name: data.sources[name].weight for name in names}
    self._mixture = Mixture(weights, seed=seed)
    self._streams = [
      Stream(data.sources[name].splits["train"], name=name, seed=seed)
      for name in names
    ]
    self._languages = [
      data.languages.index(data.sources[name].language) for name in names
    ]
    self._before = self._mixture.rows_before(state.rows)
    self._start = np.array([state.tokens[name] for name in names], np.int64)

  def __len__(self) -> int:
    return sys.maxsize  # as far as anyone counts

  def __repr__(self) -> str:
    return f"batches of {self._batch_size} rows from {self._state}"

  def __getitem__(self, index: Any) -> tuple[Batch, DataState]:
    first = self._state.rows + int(index) * self._batch_size
    packed = []
    for row in (first + offset for offset in self._local):
      source = self._mixture.source(row)
      position = self._positions(row)[source]
      pieces = self._streams[source].pieces(int(position), self._length + 1)
      packed.append(rows.pack(pieces, language=self._languages[source]))
    after = first + self._batch_size
    tokens = map(int, self._positions(after))
    state = DataState(
      rows=after, tokens=dict(zip(self._mixture.names, tokens, strict=True))
    )
    return rows.stack(packed), state

  def _positions(self, row: int) -> Int[np.ndarray, " sources"]:
    """Where in every stream the next row begins, before row number `row`."""
    done = self._mixture.rows_before(row) - self._before
    return self._start + done * self._length


def train_batches(
  data: PreparedData,
  *,
  state: DataState,
  batch_size: int,
  sequence_length: int,
  seed: int,
  rows_read: Sequence[int] | None = None,
) -> Iterator[tuple[Batch, DataState]]:
  """Endless training batches of one process, read ahead by Grain.

  Args:
    data: prepared text.
    state: where to begin.
    batch_size: rows of all processes together.
    sequence_length: T.
    seed: of the order of documents and of the mixture.
    rows_read: which rows of each batch to read, in this order; None is all.
      The batch does not depend on it.

  Returns:
    Pairs of the rows, NumPy arrays [B, T] of those that are read, and the
    global state after the whole batch.

  Raises:
    errors.UserError: where the state is of other data.
  """
  if rows_read is None:
    rows_read = range(batch_size)
  if sorted(state.tokens) != sorted(data.sources):
    raise errors.UserError(
      f"the data position is of sources {', '.join(sorted(state.tokens))}, the"
      f" data have {', '.join(sorted(data.sources))}"
    )
  source = _Batches(
    data,
    state=state,
    batch_size=batch_size,
    sequence_length=sequence_length,
    seed=seed,
    rows_read=rows_read,
  )
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
  return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def evaluation_batches(
  data: PreparedData,
  *,
  split: Split,
  language: str,
  batch_size: int,
  sequence_length: int,
  max_tokens: int = 0,
) -> Iterator[Batch]:
  """Every target of a split in one language, once, in a fixed order.

  Documents of all sources are in one fixed order drawn over them all, so that
  a part of the split is a sample of it.

  Args:
    data: prepared text.
    split: which.
    language: one of `data.languages`.
    batch_size: rows; the last batch is filled with padding.
    sequence_length: T.
    max_tokens: positions to read; 0 is all.

  Yields:
    Batches of NumPy arrays [B, T].
  """
  if language not in data.languages:
    raise errors.unknown_name("language", language, data.languages)
  stores = [
    source.splits[split]
    for _, source in sorted(data.sources.items())
    if source.language == language
  ]
  pieces = _in_fixed_order(stores, limit=max_tokens + 1 if max_tokens else 0)
  number = data.languages.index(language)
  packed = []
  for row in rows.cut(pieces, sequence_length):
    packed.append(rows.pack(row, language=number, length=sequence_length))
    if len(packed) == batch_size:
      yield rows.stack(packed)
      packed = []
  if packed:
    empty = rows.pack([], language=number, length=sequence_length)
    yield rows.stack(packed + [empty] * (batch_size - len(packed)))


def _in_fixed_order(
  stores: list[TokenStore], *, limit: int
) -> Iterator[np.ndarray]:
  """The documents of all stores, of `limit` tokens together; 0 is all."""
  owners = np.repeat(
    np.arange(len(stores)), [store.num_documents for store in stores]
  )
  numbers = np.concatenate([np.arange(s.num_documents) for s in stores])
  order = np.random.default_rng(0).permutation(len(owners))
  left = limit or sys.maxsize
  for i in order:
    store, document = stores[owners[i]], int(numbers[i])
    tokens = store.read(document, 0, int(store.lengths[document]))[:left]
    left -= len(tokens)
    yield tokens
    if not left:
      return
