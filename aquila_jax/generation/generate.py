"""Text from a model: whole continuations, or pieces as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.types import Params
from aquila_jax.generation import decoding
from aquila_jax.generation.sampling import Chooser, Sampling, make_chooser

# Prompts are padded to a power of two from here on, so that prompts of similar
# lengths share a program.
_SHORTEST_BUCKET = 16
# Names under which tokenizers keep the token that ends a document.
_END_OF_TEXT = (
  "<|endoftext|>",
  "<|end_of_text|>",
  "</s>",
  "<eos>",
  "<｜end▁of▁sentence｜>",
)
_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModel:
  """What it takes to turn a prompt into a continuation."""

  config: ModelConfig
  params: Params
  tokenizer: Tokenizer


def text_model(stored: StoredModel) -> TextModel:
  """The content of a MODEL directory, ready to generate.

  Raises:
    errors.UserError: where its tokenizer cannot be read.
  """
  if stored.tokenizer is None:
    raise errors.UserError(
      "the MODEL has no tokenizer.json; import it again with --tokenizer"
    )
  try:
    tokenizer = Tokenizer.from_str(stored.tokenizer)
  # The library raises nothing narrower for a text that it cannot read.
  except Exception as error:
    reason = str(error).splitlines()[0]
    raise errors.UserError(
      f"the MODEL's tokenizer.json is damaged: {reason}"
    ) from error
  return TextModel(
    config=stored.config, params=stored.params, tokenizer=tokenizer
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """The continuation of one prompt."""

  text: str  # without the prompt
  tokens: tuple[int, ...]  # without the stop token
  # It met the stop token, max_new_tokens, or the model's context_length.
  ended_by: Literal["stop", "length", "context"]

  @property
  def finished(self) -> bool:
    return self.ended_by == "stop"


def generate(
  model: TextModel, prompts: Sequence[str], *, sampling: Sampling
) -> list[Generation]:
  """Continues every prompt.

  The rows do not see each other. A mixture of experts runs dropless, whatever
  capacity it was trained with.

  Args:
    model: the model and its tokenizer.
    prompts: texts; the tokenizer of a MODEL puts end of text in front, so
      that an empty one begins a document.
    sampling: the options.

  Returns:
    One continuation a prompt, in order.

  Raises:
    errors.UserError: on a prompt of no tokens, or one that leaves no room in
      the model's context.
  """
  if not prompts:
    return []
  request = _prepare(model, prompts, sampling=sampling)
  tokens, count = decoding.decode_all(
    model.config,
    model.params,
    request.prompts,
    request.lengths,
    chooser=request.chooser,
    stop_token=request.stop_token,
    limit=request.limit,
    max_new_tokens=request.room,
  )
  rows = np.asarray(tokens)[:, : int(count)]
  return [
    request.generation(model, row, chosen.tolist())
    for row, chosen in enumerate(rows)
  ]


def stream(
  model: TextModel, prompt: str, *, sampling: Sampling
) -> Iterator[str]:
  """Continues one prompt, in pieces of whole characters as they are known.

  The pieces joined are the text that `generate` gives for the prompt alone.

  Args:
    model: the model and its tokenizer.
    prompt: a text.
    sampling: the options.

  Yields:
    Pieces of text, none empty.

  Raises:
    errors.UserError: as `generate`.
  """
  request = _prepare(model, [prompt], sampling=sampling)
  fixed: dict[str, Any] = dict(
    chooser=request.chooser, stop_token=request.stop_token
  )
  state = decoding.prefill_once(
    model.config,
    model.params,
    request.prompts,
    request.lengths,
    max_new_tokens=request.room,
    **fixed,
  )
  shown = ""
  for count in range(1, int(request.limit) + 1):
    chosen = np.asarray(state.tokens)[0, :count].tolist()
    done = bool(state.finished[0]) or count == int(request.limit)
    text = request.generation(model, 0, chosen).text
    # The last character may be the first bytes of one that is not complete.
    if not done and text.endswith(_REPLACEMENT):
      text = text[:-1]
    if text.startswith(shown) and len(text) > len(shown):
      yield text[len(shown) :]
      shown = text
    if done:
      return
    state = decoding.advance_once(model.config, model.params, state, **fixed)


def end_of_text(tokenizer: Tokenizer) -> int | None:
  """The id of the token that ends a document, or None where none is known.

  The tokenizer of a MODEL begins every text with it, as training does. Of
  others it is the only special token, or the first of the usual names.
  """
  begins = tokenizer.encode("").ids
  if len(begins) == 1:
    return begins[0]
  special = {
    token.content: token_id
    for token_id, token in tokenizer.get_added_tokens_decoder().items()
    if token.special
  }
  if len(special) == 1:
    return next(iter(special.values()))
  return next((special[name] for name in _END_OF_TEXT if name in special), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
  """Prompts and options as the programs take them."""

  prompt_ids: list[list[int]]
  prompts: np.ndarray  # int32 [B T]; padded on the left
  lengths: np.ndarray  # int32 [B]
  chooser: Chooser
  stop_token: np.ndarray  # int32 []
  limit: np.ndarray  # int32 []; new tokens of a row, at most
  room: int  # N, a power of two >= limit
  max_new_tokens: int
  context_length: int

  def generation(
    self, model: TextModel, row: int, chosen: list[int]
  ) -> Generation:
    """What became of a row, from all tokens chosen for it."""
    room = self.context_length - len(self.prompt_ids[row])
    ended_by = "length" if room >= self.max_new_tokens else "context"
    chosen = chosen[:room]
    stop = int(self.stop_token)
    if stop in chosen:
      chosen, ended_by = chosen[: chosen.index(stop)], "stop"
    text = _continuation(model.tokenizer, self.prompt_ids[row], chosen)
    return Generation(text=text, tokens=tuple(chosen), ended_by=ended_by)


def _prepare(
  model: TextModel, prompts: Sequence[str], *, sampling: Sampling
) -> _Request:
  config, tokenizer = model.config, model.tokenizer
  ids = encode_prompts(
    prompts, tokenizer=tokenizer, context_length=config.context_length
  )
  width = _power_of_two(max(_SHORTEST_BUCKET, *map(len, ids)))
  padded = np.zeros((len(ids), width), np.int32)
  for row, tokens in zip(padded, ids, strict=True):
    row[width - len(tokens) :] = tokens
  stop = sampling.stop_token
  if stop is None:
    stop = end_of_text(tokenizer)
  # No row has more room than the one with the shortest prompt.
  limit = min(
    sampling.max_new_tokens, config.context_length - min(map(len, ids))
  )
  return _Request(
    prompt_ids=ids,
    prompts=padded,
    lengths=np.asarray([len(row) for row in ids], np.int32),
    chooser=make_chooser(
      sampling,
      batch_size=len(ids),
      vocab_size=min(tokenizer.get_vocab_size(), config.vocab_size),
    ),
    stop_token=np.asarray(-1 if stop is None else stop, np.int32),
    limit=np.asarray(limit, np.int32),
    room=_power_of_two(limit),
    max_new_tokens=sampling.max_new_tokens,
    context_length=config.context_length,
  )


def encode_prompts(
  prompts: Sequence[str], *, tokenizer: Tokenizer, context_length: int
) -> list[list[int]]:
  """The tokens of every prompt.

  Args:
    prompts: texts.
    tokenizer: of the model.
    context_length: of the model.

  Returns:
    Token ids.

  Raises:
    errors.UserError: on a prompt that is no text, of no tokens, or that leaves
      no room in the context.
  """
  for prompt in prompts:
    # Bytes that the command line could not decode.
    if any("\ud800" <= character <= "\udfff" for character in prompt):
      raise errors.UserError(f"prompt={prompt!r}: is not valid UTF-8")
  ids = [tokenizer.encode(prompt).ids for prompt in prompts]
  for prompt, row in zip(prompts, ids, strict=True):
    _check_prompt(prompt, len(row), context_length=context_length)
  return ids


def _check_prompt(prompt: str, length: int, *, context_length: int) -> None:
  shown = prompt if len(prompt) <= 40 else prompt[:37] + "..."
  if not length:
    raise errors.UserError(
      f"prompt={shown!r}: has no tokens; give at least one character"
    )
  if length >= context_length:
    raise errors.UserError(
      f"prompt={shown!r}: has {length} tokens; expected fewer than the model's"
      f" context_length={context_length}"
    )


def _power_of_two(number: int) -> int:
  return 1 << (number - 1).bit_length()


def _continuation(
  tokenizer: Tokenizer, prompt: list[int], tokens: list[int]
) -> str:
  """The text that `tokens` add; a decoder may treat a beginning otherwise."""
  before = tokenizer.decode(prompt)
  return tokenizer.decode(prompt + tokens)[len(before) :]
