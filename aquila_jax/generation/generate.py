"""Text from a model: whole continuations, or pieces as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from tokenizers import Tokenizer

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.types import Params
from aquila_jax.generation import tokens as tokens_lib
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import Timing

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
  # Ids that end a text; () is the tokenizer's end of text.
  stop_tokens: tuple[int, ...] = ()
  # The id that begins a text by the model's own word, if it has one.
  begin_token: int | None = None


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
    config=stored.config,
    params=stored.params,
    tokenizer=tokenizer,
    stop_tokens=stored.stop_tokens,
    begin_token=stored.begin_token,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """The continuation of one prompt."""

  text: str  # without the prompt
  tokens: tuple[int, ...]  # without the prompt and the stop token
  # It met a stop token, max_new_tokens, or the model's context_length.
  ended_by: Literal["stop", "length", "context"]

  @property
  def finished(self) -> bool:
    return self.ended_by == "stop"


def generate(
  model: TextModel,
  prompts: Sequence[str],
  *,
  sampling: Sampling,
  row_ids: Sequence[int] | None = None,
  timing: Timing | None = None,
) -> list[Generation]:
  """Continues every prompt.

  The rows do not see each other. A mixture of experts runs dropless, whatever
  capacity it was trained with.

  Args:
    model: the model and its tokenizer.
    prompts: texts; the tokenizer of a MODEL puts end of text in front, so
      that an empty one begins a document.
    sampling: the options.
    row_ids: the number of each prompt, as for `generate_tokens`.
    timing: is added to.

  Returns:
    One continuation a prompt, in order.

  Raises:
    errors.UserError: on a prompt of no tokens, or one that leaves no room in
      the model's context.
  """
  ids = encode_prompts(
    prompts,
    tokenizer=model.tokenizer,
    context_length=model.config.context_length,
  )
  rows = tokens_lib.generate_tokens(
    model.config,
    model.params,
    ids,
    sampling=_with_stop_tokens(model, sampling),
    row_ids=row_ids,
    vocab_size=model.tokenizer.get_vocab_size(),
    timing=timing,
  )
  return [
    Generation(
      text=_continuation(model.tokenizer, prompt, row.tokens),
      tokens=row.tokens,
      ended_by=row.ended_by,
    )
    for prompt, row in zip(ids, rows, strict=True)
  ]


def stream(
  model: TextModel,
  prompt: str,
  *,
  sampling: Sampling,
  timing: Timing | None = None,
) -> Iterator[str]:
  """Continues one prompt, in pieces of whole characters as they are known.

  The pieces joined are the text that `generate` gives for the prompt alone.

  Args:
    model: the model and its tokenizer.
    prompt: a text.
    sampling: the options.
    timing: is added to, at the end.

  Yields:
    Pieces of text, none empty.

  Raises:
    errors.UserError: as `generate`.
  """
  tokenizer = model.tokenizer
  (ids,) = encode_prompts(
    [prompt], tokenizer=tokenizer, context_length=model.config.context_length
  )
  known = tokens_lib.stream_tokens(
    model.config,
    model.params,
    ids,
    sampling=_with_stop_tokens(model, sampling),
    vocab_size=tokenizer.get_vocab_size(),
    timing=timing,
  )
  shown = text = ""
  for one in known:
    text = _continuation(tokenizer, ids, one.tokens)
    # The last character may be the first bytes of one that is not complete.
    whole = text[:-1] if text.endswith(_REPLACEMENT) else text
    if whole.startswith(shown) and len(whole) > len(shown):
      yield whole[len(shown) :]
      shown = whole
  if text.startswith(shown) and len(text) > len(shown):
    yield text[len(shown) :]


def stop_tokens(model: TextModel) -> tuple[int, ...]:
  """What ends a text where `Sampling.stop_tokens` says nothing.

  The model's own ids, or where it names none its tokenizer's end of text.
  """
  if model.stop_tokens:
    return model.stop_tokens
  token = end_of_text(model.tokenizer)
  return () if token is None else (token,)


def _with_stop_tokens(model: TextModel, sampling: Sampling) -> Sampling:
  if sampling.stop_tokens is not None:
    return sampling
  # A tokenizer may know ids that the model has no row for.
  size = model.config.vocab_size
  possible = tuple(t for t in stop_tokens(model) if t < size)
  return dataclasses.replace(sampling, stop_tokens=possible)


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


def _continuation(
  tokenizer: Tokenizer, prompt: list[int], tokens: Sequence[int]
) -> str:
  """The text that `tokens` add; a decoder may treat a beginning otherwise."""
  before = tokenizer.decode(prompt)
  return tokenizer.decode([*prompt, *tokens])[len(before) :]
