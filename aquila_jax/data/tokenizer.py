"""Tokenizers: a byte-level BPE trained on the text, or any tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from aquila_jax.core import errors

# Letters with at most one character in front, single digits, runs of
# punctuation, runs of blank space: no token spans two of them.
_PIECES = (
  r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE_MARK = "\u2581"  # of SentencePiece


class Tokenizer:
  """Text to token ids and back, and what a token stands for.

  Its file begins every encoded text with end_of_text, as training does; the
  methods here leave that to the caller.

  Args:
    backend: takes no truncation or padding from its file.
    end_of_text: the token that stands before and after every document.
    what: where the tokenizer is from, for messages.
  """

  def __init__(
    self, backend: tokenizers.Tokenizer, *, end_of_text: str, what: str
  ):
    token_id = backend.token_to_id(end_of_text)
    if token_id is None:
      special = [t.content for t in backend.get_added_tokens_decoder().values()]
      raise errors.UserError(
        f"{what}: has no token end_of_text={end_of_text!r};"
        f" {errors.nearest(end_of_text, special)}"
      )
    backend.no_truncation()
    backend.no_padding()
    # What looks like a special token in a text is text.
    backend.encode_special_tokens = True
    backend.add_special_tokens([end_of_text])
    backend.post_processor = processors.TemplateProcessing(
      single=[end_of_text, "$A"],
      pair=[end_of_text, "$A", "$B"],
      special_tokens=[(end_of_text, token_id)],
    )
    self._backend = backend
    self._what = what
    self.end_of_text = end_of_text
    self.end_of_text_id: int = token_id

  @classmethod
  def from_text(
    cls, text: str, *, end_of_text: str | None = None, what: str = "tokenizer"
  ) -> Tokenizer:
    """Reads the text of a tokenizer.json.

    Args:
      text: the file's content.
      end_of_text: None is the token with which the file begins every text.
      what: where the text is from, for messages.

    Returns:
      The tokenizer.

    Raises:
      errors.UserError: where this is no tokenizer, or has no such token.
    """
    try:
      backend = tokenizers.Tokenizer.from_str(text)
    # The library raises nothing narrower for a file that it cannot read.
    except Exception as error:
      reason = str(error).splitlines()[0]
      raise errors.UserError(
        f"{what} is no tokenizer.json: {reason}"
      ) from error
    name = end_of_text or _first_of_template(json.loads(text))
    if name is None:
      raise errors.UserError(
        f"{what}: does not say which token begins a text; give end_of_text"
      )
    return cls(backend, end_of_text=name, what=what)

  @classmethod
  def from_file(
    cls, path: str | os.PathLike[str], *, end_of_text: str, field: str
  ) -> Tokenizer:
    """Reads a tokenizer.json; `field` names it in messages."""
    what = f"{field}={str(path)!r}"
    try:
      text = pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, "strerror", None) or "not UTF-8"
      raise errors.UserError(
        f"{what}: cannot be read ({reason}); expected a tokenizer.json"
      ) from error
    return cls.from_text(text, end_of_text=end_of_text, what=what)

  @classmethod
  def train(
    cls, texts: Iterable[str], *, vocab_size: int, end_of_text: str, field: str
  ) -> Tokenizer:
    """Trains a byte-level BPE of exactly `vocab_size` tokens.

    Args:
      texts: to train on; the result depends on nothing else.
      vocab_size: end_of_text, 256 bytes and the merges.
      end_of_text: the name of the only special token.
      field: the name of `vocab_size`, for messages.

    Returns:
      The tokenizer.

    Raises:
      errors.UserError: where the text has too few different pieces.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[end_of_text],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
      raise errors.UserError(
        f"{field}={vocab_size}: the text has pieces for {found} tokens only;"
        f" expected at most {found}, or more text"
      )
    return cls(backend, end_of_text=end_of_text, what="the trained tokenizer")

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest id; a file may leave out some below."""
    return max(self._backend.get_vocab().values()) + 1

  @functools.cached_property
  def token_bytes(self) -> Int[np.ndarray, " V"]:
    """How many bytes of UTF-8 each token stands for; special tokens for none.

    Over the tokens of a text they sum to its length, unless the tokenizer
    changes the text or puts a space in front.
    """
    lengths = np.zeros(self.vocab_size, np.int32)
    measure = _measure(json.loads(self.to_text()), what=self._what)
    added = self._backend.get_added_tokens_decoder()
    for token, token_id in self._backend.get_vocab().items():
      if token_id not in added:
        lengths[token_id] = measure(token)
      elif not added[token_id].special:
        lengths[token_id] = len(token.encode())
    return lengths

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(self.to_text().encode()).hexdigest()

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text, without end_of_text."""
    encodings = self._backend.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, without end_of_text."""
    return self.encode_batch([text])[0]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids; special tokens are left out."""
    return self._backend.decode(list(ids), skip_special_tokens=True)

  def to_text(self) -> str:
    """The content of a tokenizer.json."""
    return self._backend.to_str()

  def equals(self, text: str) -> bool:
    """Whether `text`, a tokenizer.json, is this one but for its beginning."""
    try:
      other = Tokenizer.from_text(text, end_of_text=self.end_of_text)
    except errors.UserError:  # no tokenizer, or without that token
      return False
    return json.loads(other.to_text()) == json.loads(self.to_text())

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a tokenizer.json."""
    pathlib.Path(path).write_text(self.to_text(), encoding="utf-8")


def _first_of_template(spec: dict[str, Any]) -> str | None:
  """The special token with which a tokenizer.json begins every text."""
  template = (spec.get("post_processor") or {}).get("single") or [{}]
  special = template[0].get("SpecialToken")
  return special["id"] if special else None


def _measure(spec: dict[str, Any], *, what: str):
  """The function from a token of the vocabulary to its bytes of text."""
  decoder = spec.get("decoder") or {}
  parts = decoder.get("decoders", [decoder])
  kinds = {part.get("type") for part in parts}
  if "ByteLevel" in kinds:
    return len  # a character of such a token is a byte
  if kinds & {"Metaspace", "ByteFallback"}:
    return _sentencepiece_bytes
  raise errors.UserError(
    f"{what}: its decoder is {decoder.get('type')}, which does not say what"
    " bytes a token stands for; expected byte-level BPE or byte fallback"
  )


def _sentencepiece_bytes(token: str) -> int:
  if _BYTE_TOKEN.fullmatch(token):
    return 1
  return len(token.replace(_SPACE_MARK, " ").encode())
