"""The tokenizer inside a GGUF file as a tokenizer.json.

GGUF keeps the vocabulary, merges or scores, and a name for how text is cut into
pieces before merging (`tokenizer.ggml.pre`); the rules behind the names are
those of the models' published tokenizers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from aquila_jax.core import errors

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"

# Pieces of Llama 3 and Qwen 2: contractions, words with one character in front,
# digits (at most three or one), punctuation, line ends, spaces.
_PIECES = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
  r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
  r"|\s+(?!\S)|\s+"
)


def _byte_level(*before: Any, use_regex: bool) -> Any:
  return pre_tokenizers.Sequence(
    [
      *before,
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex),
    ]
  )


def _split(digits: str) -> Any:
  pieces = Regex(_PIECES.format(digits=digits))
  return pre_tokenizers.Split(pieces, behavior="isolated")


# tokenizer.ggml.pre -> how a text is cut, of byte-level BPE.
_PRE_TOKENIZERS = {
  "gpt-2": lambda: _byte_level(use_regex=True),
  "smollm": lambda: _byte_level(
    pre_tokenizers.Digits(individual_digits=True), use_regex=True
  ),
  "llama-bpe": lambda: _byte_level(_split("{1,3}"), use_regex=False),
  "qwen2": lambda: _byte_level(_split(""), use_regex=False),
}


def to_json(metadata: Mapping[str, Any], *, what: str) -> str | None:
  """The tokenizer.json that a GGUF file's metadata describe.

  Args:
    metadata: all keys of the file.
    what: the file, for messages.

  Returns:
    The text, or None where the file has no tokenizer.

  Raises:
    errors.UserError: where its kind is not known, or it is damaged.
  """
  try:
    return _to_json(metadata, what=what)
  except errors.UserError:
    raise
  # The library raises nothing narrower for what makes no tokenizer.
  except Exception as error:
    raise errors.UserError(
      f"{what}: its tokenizer is damaged: {type(error).__name__}:"
      f" {str(error).splitlines()[0]}; give --tokenizer=tokenizer.json"
    ) from error


def _to_json(metadata: Mapping[str, Any], *, what: str) -> str | None:
  kind = metadata.get("tokenizer.ggml.model")
  if kind is None or kind == "none":
    return None
  tokens = metadata.get("tokenizer.ggml.tokens")
  if not tokens:
    raise errors.UserError(f"{what}: tokenizer.ggml.tokens is missing")
  if kind == "gpt2":
    tokenizer = _byte_level_bpe(metadata, tokens, what=what)
  elif kind == "llama":
    tokenizer = _sentencepiece(metadata, tokens, what=what)
  else:
    raise errors.UserError(
      f"{what}: tokenizer.ggml.model={kind!r} is not known; expected gpt2 or"
      " llama, or give --tokenizer=tokenizer.json"
    )
  _add_special(tokenizer, metadata, tokens)
  return tokenizer.to_str()


def _byte_level_bpe(
  metadata: Mapping[str, Any], tokens: list[str], *, what: str
) -> Tokenizer:
  pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
  if pre not in _PRE_TOKENIZERS:
    raise errors.UserError(
      f"{what}: tokenizer.ggml.pre={pre!r} is not known; expected one of"
      f" {', '.join(_PRE_TOKENIZERS)}, or give --tokenizer=tokenizer.json"
    )
  merges = [
    tuple(merge.split(" ", 1))
    for merge in metadata.get("tokenizer.ggml.merges", [])
  ]
  vocab = {token: i for i, token in enumerate(tokens)}
  tokenizer = Tokenizer(
    models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
  )
  if pre == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def _sentencepiece(
  metadata: Mapping[str, Any], tokens: list[str], *, what: str
) -> Tokenizer:
  """BPE by scores: the pair whose union has the best score is merged first."""
  scores = metadata.get("tokenizer.ggml.scores")
  if not scores:
    raise errors.UserError(f"{what}: tokenizer.ggml.scores is missing")
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = []
  for token, score in zip(tokens, scores, strict=True):
    halves = [(token[:i], token[i:]) for i in range(1, len(token))]
    known = [(a, b) for a, b in halves if a in vocab and b in vocab]
    known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    merges += [(score, pair) for pair in known]
  merges.sort(key=lambda merge: merge[0], reverse=True)
  unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
  tokenizer = Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=[pair for _, pair in merges],
      unk_token=tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  space = [normalizers.Replace(" ", _SPACE)]
  strip = []
  if metadata.get("tokenizer.ggml.add_space_prefix", True):
    space = [normalizers.Prepend(_SPACE), *space]
    strip = [decoders.Strip(" ", 1, 0)]
  tokenizer.normalizer = normalizers.Sequence(space)
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  return tokenizer


def _add_special(
  tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]
) -> None:
  kinds = metadata.get("tokenizer.ggml.token_type") or []
  for token, kind in itertools.zip_longest(tokens, kinds[: len(tokens)]):
    if kind == _CONTROL:
      tokenizer.add_special_tokens([AddedToken(token, special=True)])
    elif kind == _USER_DEFINED:
      tokenizer.add_tokens([AddedToken(token, normalized=False)])
  bos = metadata.get("tokenizer.ggml.bos_token_id")
  # Llama's own tokenizers begin every text where the key is not there.
  default = metadata["tokenizer.ggml.model"] == "llama" or (
    metadata.get("tokenizer.ggml.pre") == "llama-bpe"
  )
  if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", default):
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[tokens[bos], "$A"],
      pair=[tokens[bos], "$A", tokens[bos], "$B"],
      special_tokens=[(tokens[bos], bos)],
    )
