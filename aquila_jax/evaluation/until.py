"""Continuations that end at strings, as evaluation harnesses ask for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Params
from aquila_jax.evaluation.token_scoring import (
  Ids,
  Progress,
  Shape,
  read_prefixes,
  shape_for,
)
from aquila_jax.generation import decoding
from aquila_jax.generation.decoding import Decoding
from aquila_jax.generation.sampling import Sampling, make_chooser
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import check_causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A text to continue."""

  tokens: list[int]  # at least one
  number: int  # of the prompt; with the seed it makes the random choices


def cut(text: str, until: Sequence[str]) -> str:
  """The text before the first of the strings; an empty string cuts nothing."""
  for end in until:
    if end:
      text = text.split(end)[0]
  return text


def fit(
  tokens: Ids, *, max_new_tokens: int, max_length: int
) -> tuple[list[int], int]:
  """The end of a prompt that leaves room, and the room that it leaves.

  Where as many tokens are asked for as the model reads at all, half of these
  are for the prompt.

  Args:
    tokens: of the prompt.
    max_new_tokens: asked for.
    max_length: the most tokens that the model may read.

  Returns:
    Tokens of the prompt and the number of new tokens, which together are at
    most `max_length`.
  """
  if max_new_tokens >= max_length:
    max_new_tokens = max(max_length // 2, 1)
  return list(tokens[-(max_length - max_new_tokens) :]), max_new_tokens


class Continuer:
  """Continues prompts with one model.

  Args:
    config: of the model.
    params: of the model.
    tokenizer: of the model.
    batch_size: rows at a time, at most.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Tokenizer,
    batch_size: int = 32,
  ):
    self._config = config
    self._params = params
    self._step_params = decoding.step_params(params, config)
    self._tokenizer = tokenizer
    self._batch_size = batch_size

  def __call__(
    self,
    prompts: Sequence[Prompt],
    *,
    until: Sequence[str],
    sampling: Sampling,
    progress: Progress = lambda done: None,
  ) -> list[str]:
    """The continuation of every prompt, in order.

    Args:
      prompts: with `sampling.max_new_tokens` no longer than the context.
      until: each ends a continuation and is no part of it.
      sampling: the options; `stop_tokens` are those given, None is none.
      progress: told after every batch.

    Returns:
      Texts, decoded without what stands in front of them and without special
      tokens.

    Raises:
      errors.UserError: on a model that is not causal.
    """
    check_causal(self._config)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens))
    texts = [""] * len(prompts)
    done = 0
    for shape, rows in self._batches(prompts, order, sampling=sampling):
      chosen = [prompts[i] for i in rows]
      found = self._continue(chosen, shape, until=until, sampling=sampling)
      for i, tokens in zip(rows, found, strict=True):
        texts[i] = cut(self._tokenizer.decode(tokens), until)
      done += len(rows)
      progress(done)
    return texts

  def _batches(
    self,
    prompts: Sequence[Prompt],
    order: Sequence[int],
    *,
    sampling: Sampling,
  ) -> Iterator[tuple[Shape, Sequence[int]]]:
    """The longest first; the rows of a batch are those of its longest."""
    start = 0
    while start < len(order):
      shape = shape_for(
        len(prompts[order[start]].tokens) - 1,
        sampling.max_new_tokens,
        batch_size=self._batch_size,
        vocab_size=self._config.vocab_size,
      )
      # What is left is spread evenly, so that the last batch is no smaller.
      left = len(order) - start
      size = -(-left // -(-left // shape.rows))
      yield shape.with_rows(size), order[start : start + size]
      start += size

  def _continue(
    self,
    prompts: Sequence[Prompt],
    shape: Shape,
    *,
    until: Sequence[str],
    sampling: Sampling,
  ) -> list[list[int]]:
    """New tokens of every row, some of which may come after its end."""
    stops = sampling.stop_tokens or ()
    fixed = {
      "chooser": make_chooser(
        sampling,
        batch_size=shape.rows,
        vocab_size=min(
          self._tokenizer.get_vocab_size(), self._config.vocab_size
        ),
        row_ids=_filled([prompt.number for prompt in prompts], shape.rows),
      ),
      # At least one, as -1 is none.
      "stop_tokens": jnp.asarray([-1, *stops], jnp.int32),
    }
    state = self._read(prompts, shape, sampling=sampling)
    found: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for count in range(1, sampling.max_new_tokens + 1):
      state = decoding.advance_once(
        self._config, self._step_params, state, **fixed
      )
      column = np.asarray(state.tokens)[:, count].tolist()
      for row in sorted(open_rows):
        if column[row] in stops:
          open_rows.remove(row)
          continue
        found[row].append(column[row])
        if self._has_ended(found[row], until):
          open_rows.remove(row)
      if not open_rows:
        break
    return found

  def _read(
    self, prompts: Sequence[Prompt], shape: Shape, *, sampling: Sampling
  ) -> Decoding:
    """The prompts read but for their last tokens, the first to go on from."""
    cache = read_prefixes(
      self._config,
      self._params,
      [prompt.tokens[:-1] for prompt in prompts],
      shape=shape,
    )
    if decoding.is_listed(self._step_params):
      cache = _list_cache(cache)
    tokens = np.zeros((shape.rows, sampling.max_new_tokens + 1), np.int32)
    tokens[: len(prompts), 0] = [prompt.tokens[-1] for prompt in prompts]
    lengths = _filled(
      [len(prompt.tokens) - 1 for prompt in prompts], shape.rows
    )
    return Decoding(
      cache=cache,
      tokens=jnp.asarray(tokens),
      count=jnp.ones((), jnp.int32),
      lengths=jnp.asarray(lengths),
      finished=jnp.arange(shape.rows) >= len(prompts),
    )

  def _has_ended(self, tokens: list[int], until: Sequence[str]) -> bool:
    """Whether one of the strings has come up among the last tokens.

    Only as many are decoded as the longest can have, and some more where it
    begins inside one.
    """
    longest = max((len(end.encode()) for end in until), default=0)
    text = self._tokenizer.decode(tokens[-(longest + 4) :])
    return any(end and end in text for end in until)


_list_cache = jax.jit(decoder_lm.list_cache)


def _filled(numbers: Sequence[int], rows: int) -> np.ndarray:
  """With zeros for the rows that are left over."""
  filled = np.zeros(rows, np.int32)
  filled[: len(numbers)] = numbers
  return filled
