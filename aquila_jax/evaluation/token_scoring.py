"""Log-probabilities of continuations, many at a time and in few programs.

A request is a context and a continuation, as ids. Its last context token and
the continuation without its last token, the tail, are what the model reads to
predict; everything before is the head. Requests of one head, such as the
options of a question, share the pass over it:

  context  a b c   continuation  d e     head  a b, tail  c d, targets  d e
  context  a b c   continuation  f       head  a b, tail  c,   targets  f

Heads end in the same slot of a cache, to the right of their padding. The cache
is copied for every tail, and the tails stand to the left of theirs:

  slot      0 1 2 3 | 4 5 6 7
  row 0     . . a b | c d . .
  row 1     . . a b | c . . .

Both are read in pieces of one length, so that one pair of programs serves all
requests of similar size, no logits of heads are computed, and memory does not
grow with the length of a text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Params
from aquila_jax.generation.decoding import inference_config
from aquila_jax.layers.attention import KVCache
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import warn_unless_causal
from aquila_jax.models.decoder_lm import DecoderLM

Ids = Sequence[int]
Progress = Callable[[int], None]  # told how many requests are done

_SMALLEST = 128
_SPARE_SLOTS = 64
_HEAD_PIECES = 8  # of a full head
_LONGEST_PIECE = 512
# The most tokens of a tail, and how many of them are read in a call.
_TAIL_PIECES = ((8, 8), (128, 16), (1024, 64))
_MOST_SLOTS = 16_384  # rows times size of a cache
_MOST_LOGITS = 2**26  # rows times tokens times V of a call, unless one row's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """How a model predicts one continuation."""

  log_prob: float  # nats; the sum over its tokens
  is_greedy: bool  # every token is the most probable one


def windows(
  context: Ids, continuation: Ids, *, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
  """Cuts a request into ones whose tokens, but for the last, fit the model.

  Every token of the continuation is predicted once, by as many tokens in front
  of it as fit: the context loses its beginning, and a continuation of more than
  `max_length` tokens is predicted in several windows. A text of which every
  token counts is the continuation of one token in front of it.

  Args:
    context: at least one id.
    continuation: ids.
    max_length: the most tokens that the model may read.

  Yields:
    A context and a continuation that together are at most max_length + 1 long.
  """
  ids = [*context, *continuation]
  for start in range(len(context), len(ids), max_length):
    end = min(start + max_length, len(ids))
    yield ids[max(end - max_length - 1, 0) : start], ids[start:end]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """The sizes of the programs that serve requests of similar length."""

  rows: int
  size: int  # tokens of a row that there is room for; 2**n or 1.5 * 2**n
  tail_piece: int  # tokens of a row in a call

  @property
  def slots(self) -> int:
    """Of the cache of a row: a full head leaves room for a short tail."""
    return self.size + _SPARE_SLOTS

  @property
  def head_piece(self) -> int:
    """Tokens of a row in a call."""
    return min(self.size // _HEAD_PIECES, _LONGEST_PIECE)

  def head_width(self, tokens: int) -> int:
    return -(-tokens // self.head_piece) * self.head_piece

  def tail_width(self, tokens: int) -> int:
    return -(-tokens // self.tail_piece) * self.tail_piece

  def with_room(self, head: int, tail: int) -> Shape:
    """The smallest that is not smaller and has room for both."""
    shape = self
    while shape.head_width(head) + shape.tail_width(tail) > shape.slots:
      low_bit = shape.size & -shape.size
      more = low_bit // 2 if shape.size == low_bit else low_bit
      shape = dataclasses.replace(shape, size=shape.size + more)
    return shape

  def with_rows(self, rows: int) -> Shape:
    """In steps of four, where that is no more than there are now."""
    return dataclasses.replace(self, rows=min(-(-rows // 4) * 4, self.rows))


def shape_for(
  head: int, tail: int, *, batch_size: int, vocab_size: int
) -> Shape:
  """The programs for a head and a tail of so many tokens.

  Rows are as many as keep cache and logits within bounds, and at most
  `batch_size`.
  """
  piece = next(
    (piece for most, piece in _TAIL_PIECES if tail <= most), _LONGEST_PIECE
  )
  shape = Shape(rows=1, size=_SMALLEST, tail_piece=piece).with_room(head, tail)
  most = min(_MOST_SLOTS // shape.size, _MOST_LOGITS // (piece * vocab_size))
  return dataclasses.replace(shape, rows=max(1, min(batch_size, most)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  """One window of one request."""

  request: int
  head: tuple[int, ...]
  tail: list[int]
  targets: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
  """Rows that are scored together."""

  heads: Shape
  tails: Shape
  rows: list[_Row]


class Scorer:
  """Scores continuations with one model.

  A mixture of experts runs dropless, so that the batch changes nothing.

  Args:
    config: of the model.
    params: of the model.
    max_length: the most tokens the model reads at once; 0 is its context.
    batch_size: rows at a time, at most.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    max_length: int = 0,
    batch_size: int = 32,
  ):
    if batch_size < 1:
      raise errors.UserError(f"batch_size={batch_size}: need >= 1")
    if max_length < 0:
      raise errors.UserError(
        f"max_length={max_length}: need >= 1; 0 is the model's context"
      )
    warn_unless_causal(config, what="scores of tasks")
    self._config = config
    self._params = params
    self._max_length = max_length or config.context_length
    self._batch_size = batch_size

  def __call__(
    self,
    requests: Sequence[tuple[Ids, Ids]],
    *,
    progress: Progress = lambda done: None,
  ) -> list[Score]:
    """The score of every request, in order.

    Args:
      requests: a context of at least one id, and its continuation. Where both
        are longer than the model reads, see `windows`.
      progress: told after every batch.

    Returns:
      The scores; of an empty continuation 0 and greedy.
    """
    log_probs = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    open_rows = np.zeros(len(requests), int)
    batches = self._batches(self._rows(requests))
    for batch in batches:
      np.add.at(open_rows, [row.request for row in batch.rows], 1)
    for batch in batches:
      for row, log_prob, is_greedy in self._score(batch):
        log_probs[row.request] += log_prob
        greedy[row.request] &= is_greedy
        open_rows[row.request] -= 1
      progress(int(np.sum(open_rows == 0)))
    return [
      Score(log_prob=float(log_prob), is_greedy=bool(is_greedy))
      for log_prob, is_greedy in zip(log_probs, greedy, strict=True)
    ]

  def _rows(self, requests: Sequence[tuple[Ids, Ids]]) -> Iterator[_Row]:
    for number, request in enumerate(requests):
      for context, targets in windows(*request, max_length=self._max_length):
        yield _Row(
          request=number,
          head=tuple(context[:-1]),
          tail=[context[-1], *targets[:-1]],
          targets=targets,
        )

  def _batches(self, rows: Iterable[_Row]) -> list[_Batch]:
    """Rows of one head together, the longest first."""
    groups: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
      groups.setdefault(row.head, []).append(row)
    by_shape: dict[Shape, list[list[_Row]]] = {}
    for head, group in groups.items():
      shape = shape_for(
        len(head),
        max(len(row.tail) for row in group),
        batch_size=self._batch_size,
        vocab_size=self._config.vocab_size,
      )
      by_shape.setdefault(shape, []).append(group)
    _merge_small(by_shape)
    return [
      batch
      for shape in sorted(by_shape, key=lambda shape: -shape.size)
      for batch in _even_batches(by_shape[shape], shape)
    ]

  def _score(self, batch: _Batch) -> Iterator[tuple[_Row, float, bool]]:
    """Reads the heads once, then the tails, those of a length together."""
    unique = {row.head: None for row in batch.rows}
    place = {head: i for i, head in enumerate(unique)}
    prefixes = read_prefixes(
      self._config, self._params, list(unique), shape=batch.heads
    )
    rows = sorted(batch.rows, key=lambda row: -len(row.tail))
    size = batch.tails.rows
    for start in range(0, len(rows), size):
      chunk = rows[start : start + size]
      index = np.zeros(size, np.int32)
      index[: len(chunk)] = [place[row.head] for row in chunk]
      log_probs, greedy = self._read_tails(
        chunk, cache=_copy_rows(prefixes, index), shape=batch.tails
      )
      for i, row in enumerate(chunk):
        count = len(row.tail)
        # Summed in float64: the order then does not show.
        total = float(np.sum(log_probs[i, :count], dtype=np.float64))
        yield row, total, bool(np.all(greedy[i, :count]))

  def _read_tails(
    self, rows: list[_Row], *, cache: KVCache, shape: Shape
  ) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every target, and whether it is the most probable."""
    width = shape.tail_width(max(len(row.tail) for row in rows))
    tokens, targets, positions, segments = (
      np.zeros((shape.rows, width), np.int32) for _ in range(4)
    )
    for i, row in enumerate(rows):
      count = len(row.tail)
      tokens[i, :count], targets[i, :count] = row.tail, row.targets
      positions[i] = len(row.head) + np.arange(width)
      segments[i, :count] = 1
    head_width = shape.head_width(max(len(row.head) for row in rows))
    assert head_width + width <= shape.slots
    config = inference_config(
      self._config, num_tokens=shape.rows * shape.tail_piece
    )
    found = []
    for start in range(0, width, shape.tail_piece):
      piece = np.s_[:, start : start + shape.tail_piece]
      log_probs, greedy, cache = _predict(
        config,
        self._params,
        tokens[piece],
        positions=positions[piece],
        segments=segments[piece],
        targets=targets[piece],
        cache=cache,
      )
      found.append((log_probs, greedy))
    log_probs, greedy = zip(*jax.device_get(found), strict=True)
    return np.concatenate(log_probs, axis=1), np.concatenate(greedy, axis=1)


def _merge_small(by_shape: dict[Shape, list[list[_Row]]]) -> None:
  """Gives rows that do not fill a call to the next larger shape.

  To compile programs of their own takes longer than their padding.
  """
  shapes = sorted(by_shape, key=lambda shape: (shape.size, shape.tail_piece))
  for shape, larger in itertools.pairwise(shapes):
    if sum(map(len, by_shape[shape])) < shape.rows:
      by_shape[larger] += by_shape.pop(shape)


def _even_batches(groups: list[list[_Row]], shape: Shape) -> Iterator[_Batch]:
  """As few as `shape.rows` heads at a time allow, all of about one size.

  The last then holds no less than the others, and few requests get few rows.
  """
  groups = sorted(groups, key=lambda group: -len(group[0].head))
  parts = -(-len(groups) // shape.rows)
  size = -(-len(groups) // parts)
  rows_each = -(-sum(map(len, groups)) // parts)
  chunks = -(-rows_each // shape.rows)
  for start in range(0, len(groups), size):
    rows = [row for group in groups[start : start + size] for row in group]
    # The longest tail need not be one of the longest head.
    fitting = shape.with_room(
      max(len(row.head) for row in rows), max(len(row.tail) for row in rows)
    )
    yield _Batch(
      heads=fitting.with_rows(size),
      tails=fitting.with_rows(-(-rows_each // chunks)),
      rows=rows,
    )


def read_prefixes(
  config: ModelConfig,
  params: Params,
  prefixes: Sequence[Ids],
  *,
  shape: Shape,
) -> KVCache:
  """A cache in which every prefix has been read; all end in the same slot.

  What all begin with, such as the examples of a task, is read once.

  Args:
    config: of the model.
    params: of the model.
    prefixes: at most `shape.rows`; they may be empty.
    shape: of the cache and of the calls.

  Returns:
    The cache, of `shape.rows` rows; those left over hold padding.
  """
  common = 0
  # Between it and the rest is padding, which would count for a window.
  if len(prefixes) > 1 and config.sliding_window is None:
    pieces = _common_length(prefixes) // shape.head_piece
    common = pieces * shape.head_piece
  first = dataclasses.replace(shape, rows=1 if common else shape.rows)
  cache = decoder_lm.make_cache(
    config, batch_size=first.rows, num_slots=shape.slots
  )
  if common:
    cache = _read_pieces(
      config, params, [prefixes[0][:common]], start=0, cache=cache, shape=first
    )
    cache = _copy_rows(cache, np.zeros(shape.rows, np.int32))
  return _read_pieces(
    config,
    params,
    [prefix[common:] for prefix in prefixes],
    start=common,
    cache=cache,
    shape=shape,
  )


def _common_length(prefixes: Sequence[Ids]) -> int:
  """How many ids all of them begin with."""
  ordered = sorted(map(tuple, prefixes))  # as words in a dictionary
  first, last = ordered[0], ordered[-1]
  pairs = enumerate(zip(first, last, strict=False))
  differing = (i for i, (one, other) in pairs if one != other)
  return next(differing, min(len(first), len(last)))


def _read_pieces(
  config: ModelConfig,
  params: Params,
  texts: Sequence[Ids],
  *,
  start: int,
  cache: KVCache,
  shape: Shape,
) -> KVCache:
  """The cache with texts from position `start` on, to the right of padding."""
  width = shape.head_width(max(map(len, texts)))
  tokens, positions, segments = (
    np.zeros((shape.rows, width), np.int32) for _ in range(3)
  )
  for i, text in enumerate(texts):
    if text:
      tokens[i, -len(text) :] = text
      positions[i, -len(text) :] = start + np.arange(len(text))
      segments[i, -len(text) :] = 1
  calls = inference_config(config, num_tokens=shape.rows * shape.head_piece)
  for begin in range(0, width, shape.head_piece):
    piece = np.s_[:, begin : begin + shape.head_piece]
    cache = _read(
      calls,
      params,
      tokens[piece],
      positions=positions[piece],
      segments=segments[piece],
      cache=cache,
    )
  return cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _read(
  config: ModelConfig,
  params: Params,
  tokens: Int[Array, "B T"],
  *,
  positions: Int[Array, "B T"],
  segments: Int[Array, "B T"],
  cache: KVCache,
) -> KVCache:
  """The cache with T more tokens; their logits are never computed."""
  out: Any = DecoderLM(config).apply(
    {"params": params},
    tokens,
    positions=positions,
    segments=segments,
    cache=cache,
  )
  return out.cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _predict(
  config: ModelConfig,
  params: Params,
  tokens: Int[Array, "B T"],
  *,
  positions: Int[Array, "B T"],
  segments: Int[Array, "B T"],
  targets: Int[Array, "B T"],
  cache: KVCache,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], KVCache]:
  """Reads T more tokens, and how well each predicts its target."""
  out: Any = DecoderLM(config).apply(
    {"params": params},
    tokens,
    positions=positions,
    segments=segments,
    cache=cache,
  )
  # The decoder's logits are at least float32.
  chosen = jnp.take_along_axis(out.logits, targets[..., None], axis=-1)[..., 0]
  log_probs = chosen - jax.nn.logsumexp(out.logits, axis=-1)
  return log_probs, jnp.argmax(out.logits, axis=-1) == targets, out.cache


@jax.jit
def _copy_rows(cache: KVCache, index: Int[Array, "B"]) -> KVCache:
  """Row index[b] of the cache as row b of a new one."""
  return cache.replace(
    key=cache.key[:, index],
    value=cache.value[:, index],
    segments=cache.segments[:, index],
  )
