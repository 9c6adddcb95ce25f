"""Ids from ids: what `generate` does for texts, for callers without texts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Bool, Int

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Params
from aquila_jax.generation import decoding
from aquila_jax.generation.sampling import Chooser, Sampling, make_chooser
from aquila_jax.models.causality import check_causal

# Prompts are padded to a power of two from here on, so that prompts of similar
# lengths share a program; so are the stop tokens.
_SHORTEST_BUCKET = 16
_FEWEST_STOPS = 4

TokenRows = Sequence[Sequence[int]] | Int[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenGeneration:
  """The continuation of one prompt of ids."""

  tokens: tuple[int, ...]  # without the prompt and the stop token
  # It met a stop token, max_new_tokens, or the model's context_length.
  ended_by: Literal["stop", "length", "context"]


@dataclasses.dataclass(kw_only=True)
class Timing:
  """Where the time of generations went; each call that is given one adds.

  A call that is given one compiles its programs beforehand, so that the rates
  are those of programs that are there.
  """

  compile_s: float = 0.0  # compiling, or loading what was compiled once
  prefill_s: float = 0.0
  decode_s: float = 0.0
  prompt_tokens: int = 0
  # Of all rows, without the first of each: that one is of the prefill.
  decoded_tokens: int = 0

  def in_words(self) -> str:
    """The rates, in one line."""
    words = (
      f"prefill: {self.prompt_tokens} tokens in {1000 * self.prefill_s:.0f} ms;"
    )
    if self.decoded_tokens:
      rate = self.decoded_tokens / self.decode_s
      words += f" decode: {self.decoded_tokens} tokens at {rate:.1f} tokens/s;"
    return words + f" {self.compile_s:.1f} s to compile, before"


def generate_tokens(
  config: ModelConfig,
  params: Params,
  prompts: TokenRows,
  *,
  sampling: Sampling,
  mask: Bool[np.ndarray, "rows columns"] | None = None,
  row_ids: Sequence[int] | None = None,
  vocab_size: int | None = None,
  timing: Timing | None = None,
) -> list[TokenGeneration]:
  """Continues every prompt; the rows do not see each other.

  A prompt's continuation does not depend on where its padding stands, nor on
  what else is in the batch. A mixture of experts runs dropless, whatever
  capacity it was trained with.

  One program serves all prompts whose number is the same and whose longest
  and `max_new_tokens` round up to the same powers of two.

  Args:
    config: of the model.
    params: of the model; where they are spread over a mesh, so is the work.
    prompts: ids, in lists of any lengths or, with `mask`, in an array that is
      padded on the left, on the right, or both.
    sampling: the options. There is no tokenizer here, so that
      `stop_tokens=None` is none.
    mask: True where `prompts` holds an id that counts; None is everywhere.
    row_ids: the number of each prompt, which with `sampling.seed` makes its
      random key; None counts from 0. A prompt gives the same alone as in a
      batch under the same number.
    vocab_size: ids from here on are never chosen; None is all of the model's.
    timing: is added to.

  Returns:
    One continuation a prompt, in order.

  Raises:
    errors.UserError: on a prompt of no ids, of ids the model does not have, or
      that leaves no room in the model's context; on a model whose experts
      choose tokens.
  """
  rows = _unpadded(prompts, mask)
  if not rows:
    return []
  run = _prepare(
    config,
    params,
    rows,
    sampling=sampling,
    row_ids=row_ids,
    vocab_size=vocab_size,
  )
  stopwatch = _Stopwatch(timing)
  if timing is not None:
    # No step is taken: the limit is reached after the prefill.
    stopwatch.lap("compile_s", run.to_end(run.prefill(), limit=1))
  state = run.prefill()
  stopwatch.lap("prefill_s", state)
  if run.limit > 1:
    state = run.to_end(state, limit=run.limit)
  chosen = np.asarray(state.tokens)[:, : int(state.count)].tolist()
  stopwatch.lap("decode_s", state)
  ended = [run.ended(row, ids) for row, ids in enumerate(chosen)]
  stopwatch.count(run, ended)
  return ended


def stream_tokens(
  config: ModelConfig,
  params: Params,
  prompt: Sequence[int],
  *,
  sampling: Sampling,
  vocab_size: int | None = None,
  timing: Timing | None = None,
) -> Iterator[TokenGeneration]:
  """Continues one prompt: what is known of it after every new token.

  Args:
    config: of the model.
    params: of the model.
    prompt: ids.
    sampling: the options, as for `generate_tokens`.
    vocab_size: ids from here on are never chosen; None is all of the model's.
    timing: is added to, at the end.

  Yields:
    The continuation so far, the last of which `generate_tokens` gives. Only
    the `ended_by` of the last has a meaning.

  Raises:
    errors.UserError: as `generate_tokens`.
  """
  run = _prepare(
    config, params, [prompt], sampling=sampling, vocab_size=vocab_size
  )
  stopwatch = _Stopwatch(timing)
  if timing is not None:
    stopwatch.lap("compile_s", run.step(run.prefill()))
  state = run.prefill()
  stopwatch.lap("prefill_s", state)
  for count in range(1, run.limit + 1):
    known = run.ended(0, np.asarray(state.tokens)[0, :count].tolist())
    done = bool(state.finished[0]) or count == run.limit
    if not done:
      # Computes while the caller shows the token.
      state = run.step(state)
    else:
      stopwatch.lap("decode_s", state)
      stopwatch.count(run, [known])
    yield known
    if done:
      return


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
  """Parameters, prompts and options as the programs take them."""

  config: ModelConfig
  params: Params
  step_params: Params
  prompts: np.ndarray  # int32 [B T]; padded on the left
  lengths: np.ndarray  # int32 [B]
  chooser: Chooser
  stop_tokens: np.ndarray  # int32 [stops]; padded with -1
  limit: int  # new tokens of a row, at most
  room: int  # N, a power of two >= limit
  max_new_tokens: int
  context_length: int

  def prefill(self) -> decoding.Decoding:
    with decoding.mesh_of(self.params):
      return decoding.prefill_once(
        self.config,
        self.params,
        self.prompts,
        self.lengths,
        chooser=self.chooser,
        stop_tokens=self.stop_tokens,
        max_new_tokens=self.room,
        listed=decoding.is_listed(self.step_params),
      )

  def step(self, state: decoding.Decoding) -> decoding.Decoding:
    with decoding.mesh_of(self.params):
      return decoding.advance_once(
        self.config,
        self.step_params,
        state,
        chooser=self.chooser,
        stop_tokens=self.stop_tokens,
      )

  def to_end(
    self, state: decoding.Decoding, *, limit: int
  ) -> decoding.Decoding:
    with decoding.mesh_of(self.params):
      return decoding.advance_to_end(
        self.config,
        self.step_params,
        state,
        chooser=self.chooser,
        stop_tokens=self.stop_tokens,
        limit=np.asarray(limit, np.int32),
      )

  def ended(self, row: int, chosen: list[int]) -> TokenGeneration:
    """What became of a row, from all tokens chosen for it."""
    room = self.context_length - int(self.lengths[row])
    chosen = chosen[:room]
    stops = set(self.stop_tokens.tolist())
    for place, token in enumerate(chosen):
      if token in stops:
        return TokenGeneration(tokens=tuple(chosen[:place]), ended_by="stop")
    return TokenGeneration(
      tokens=tuple(chosen),
      ended_by="length" if room >= self.max_new_tokens else "context",
    )


class _Stopwatch:
  """Fills a `Timing`; does nothing, and waits for nothing, without one."""

  def __init__(self, timing: Timing | None):
    self._timing = timing
    self._start = time.perf_counter()

  def lap(self, name: str, state: decoding.Decoding) -> None:
    """Adds the time since the last lap, until `state` is there."""
    if self._timing is None:
      return
    jax.block_until_ready(state)
    now = time.perf_counter()
    elapsed = getattr(self._timing, name) + now - self._start
    setattr(self._timing, name, elapsed)
    self._start = now

  def count(self, run: _Run, ended: Sequence[TokenGeneration]) -> None:
    if self._timing is None:
      return
    self._timing.prompt_tokens += int(run.lengths.sum())
    for one in ended:
      chosen = len(one.tokens) + (one.ended_by == "stop")
      self._timing.decoded_tokens += chosen - 1


def _prepare(
  config: ModelConfig,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  sampling: Sampling,
  row_ids: Sequence[int] | None = None,
  vocab_size: int | None = None,
) -> _Run:
  _check(config, prompts, sampling=sampling)
  if row_ids is not None and len(row_ids) != len(prompts):
    raise errors.UserError(
      f"row_ids: has {len(row_ids)} numbers; need one for each of the"
      f" {len(prompts)} prompts"
    )
  lengths = np.asarray([len(row) for row in prompts], np.int32)
  width = _power_of_two(max(_SHORTEST_BUCKET, int(lengths.max())))
  padded = np.zeros((len(prompts), width), np.int32)
  for row, tokens in zip(padded, prompts, strict=True):
    row[width - len(tokens) :] = tokens
  stops = sampling.stop_tokens or ()
  padded_stops = np.full(
    _power_of_two(max(_FEWEST_STOPS, len(stops))), -1, np.int32
  )
  padded_stops[: len(stops)] = stops
  # No row has more room than the one with the shortest prompt.
  limit = min(
    sampling.max_new_tokens, config.context_length - int(lengths.min())
  )
  return _Run(
    config=config,
    params=params,
    step_params=decoding.step_params(params, config),
    prompts=padded,
    lengths=lengths,
    chooser=make_chooser(
      sampling,
      batch_size=len(prompts),
      vocab_size=min(vocab_size or config.vocab_size, config.vocab_size),
      row_ids=None if row_ids is None else np.asarray(row_ids, np.int32),
    ),
    stop_tokens=padded_stops,
    limit=limit,
    room=_power_of_two(limit),
    max_new_tokens=sampling.max_new_tokens,
    context_length=config.context_length,
  )


def _unpadded(
  prompts: TokenRows, mask: Bool[np.ndarray, "rows columns"] | None
) -> list[list[int]]:
  """The ids of every row, without its padding."""
  if mask is None:
    return [np.asarray(row).tolist() for row in prompts]
  array = np.asarray(prompts)
  if array.shape != mask.shape:
    raise errors.UserError(
      f"mask: has shape {mask.shape}; need that of prompts, {array.shape}"
    )
  return [row[kept].tolist() for row, kept in zip(array, mask, strict=True)]


def _check(
  config: ModelConfig, prompts: Sequence[Sequence[int]], *, sampling: Sampling
) -> None:
  check_causal(config)
  size, context = config.vocab_size, config.context_length
  for row, ids in enumerate(prompts):
    if not ids:
      raise errors.UserError(f"prompts[{row}]: has no tokens; need at least 1")
    if len(ids) >= context:
      raise errors.UserError(
        f"prompts[{row}]: has {len(ids)} tokens; expected fewer than the"
        f" model's context_length={context}"
      )
    for token in ids:
      if not 0 <= token < size:
        raise errors.UserError(
          f"prompts[{row}]: has the id {token}; need 0 <= id <"
          f" vocab_size={size}"
        )
  for token in sampling.stop_tokens or ():
    if token >= size:
      raise errors.UserError(
        f"stop_tokens={sampling.stop_tokens}: need ids < vocab_size={size}"
      )


def _power_of_two(number: int) -> int:
  return 1 << (number - 1).bit_length()
