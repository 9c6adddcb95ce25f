"""What a token stands for: its bytes, its class, and how a page shows it.

A tokenizer's token need not be a whole character: byte-level BPE cuts where it
likes, and a model without a tokenizer reads bytes. So a token is its bytes, and
what is no UTF-8 by itself is a fragment of a character.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Mapping

import tokenizers

SPECIAL = "special"
FRAGMENT = "byte fragment"
SPACE = "whitespace"
DIGITS = "digits"
PUNCTUATION = "punctuation"
SYMBOLS = "symbols, emoji"
MIXED = "two scripts"
OTHER_LETTERS = "other letters"
OTHER = "other"

# By the first word of a letter's name in Unicode: Python's tables have no
# scripts.
_SCRIPTS = {
  "LATIN": "Latin",
  "CJK": "CJK",
  "IDEOGRAPHIC": "CJK",
  "BOPOMOFO": "CJK",
  "HIRAGANA": "Kana",
  "KATAKANA": "Kana",
  "HANGUL": "Hangul",
  "CYRILLIC": "Cyrillic",
  "GREEK": "Greek",
  "ARABIC": "Arabic",
  "HEBREW": "Hebrew",
  "DEVANAGARI": "Devanagari",
  "THAI": "Thai",
}
# In the order of a page.
CLASSES = (
  *dict.fromkeys(_SCRIPTS.values()),
  OTHER_LETTERS,
  MIXED,
  DIGITS,
  PUNCTUATION,
  SYMBOLS,
  SPACE,
  FRAGMENT,
  SPECIAL,
  OTHER,
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"  # of SentencePiece
_VISIBLE = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\0": "␀"}


class TokenText:
  """The bytes of the tokens of a tokenizer, or of a model that reads bytes.

  Args:
    tokenizer: the text of a tokenizer.json; None where tokens are bytes.
  """

  def __init__(self, tokenizer: str | None):
    self._backend = None
    if tokenizer is None:
      return
    self._backend = tokenizers.Tokenizer.from_str(tokenizer)
    self._added = self._backend.get_added_tokens_decoder()
    self._kinds = _decoders(json.loads(tokenizer).get("decoder") or {})

  def is_special(self, token: int) -> bool:
    """Whether a token is none of a text, such as the end of one."""
    if self._backend is None:
      return False
    added = self._added.get(token)
    return added is not None and added.special

  def text(self, token: int) -> bytes:
    """The bytes of a token; of a special one its name."""
    if self._backend is None:
      return bytes([token]) if token < 256 else b""
    if token in self._added:
      return self._added[token].content.encode()
    name = self._backend.id_to_token(token)
    if name is None:  # a row of the embedding beyond the tokenizer
      return b""
    if "ByteLevel" in self._kinds:
      table = _byte_level()
      if all(c in table for c in name):
        return bytes(table[c] for c in name)
      return name.encode()
    if self._kinds & {"Metaspace", "ByteFallback"}:
      byte = _BYTE_TOKEN.fullmatch(name)
      if byte:
        return bytes([int(byte[1], 16)])
      return name.replace(_SPACE_MARK, " ").encode()
    return name.encode()

  def token_class(self, token: int) -> str:
    """One of `CLASSES`."""
    if self.is_special(token):
      return SPECIAL
    return classify(self.text(token))

  def shown(self, token: int) -> str:
    """A token as a page shows it: spaces and line ends made visible."""
    if self.is_special(token):
      return self.text(token).decode()
    return visible(self.text(token)) or f"#{token}"


def classify(text: bytes) -> str:
  """The class of a token's bytes.

  Letters decide before digits, digits before punctuation, and so on: " don't"
  is Latin, "$5" digits. What is no UTF-8 is a fragment.
  """
  try:
    kinds = {_kind(c) for c in text.decode()}
  except UnicodeDecodeError:
    return FRAGMENT
  letters = kinds & {*_SCRIPTS.values(), OTHER_LETTERS}
  if letters:
    return MIXED if len(letters) > 1 else letters.pop()
  for kind in (DIGITS, PUNCTUATION, SYMBOLS, SPACE):
    if kind in kinds:
      return kind
  return OTHER


@functools.lru_cache(4096)
def _kind(character: str) -> str:
  category = unicodedata.category(character)
  if character.isspace():
    return SPACE
  if category[0] == "L" or category == "Nl":
    # A fullwidth or a bold A is an A.
    plain = unicodedata.normalize("NFKC", character)[0]
    first = unicodedata.name(plain, "").split(" ")[0]
    return _SCRIPTS.get(first, OTHER_LETTERS)
  by_category = {"N": DIGITS, "P": PUNCTUATION, "S": SYMBOLS}
  return by_category.get(category[0], OTHER)


def visible(text: bytes) -> str:
  """Text with signs for what cannot be seen; bytes of fragments in hex."""
  try:
    decoded = text.decode()
  except UnicodeDecodeError:
    return "⟨" + text.hex(" ").upper() + "⟩"
  return "".join(map(_visible, decoded))


def _visible(character: str) -> str:
  if character in _VISIBLE:
    return _VISIBLE[character]
  hidden = unicodedata.category(character)[0] in "CZ"
  return f"⟨U+{ord(character):04X}⟩" if hidden else character


def _decoders(decoder: Mapping) -> set[str]:
  parts = decoder.get("decoders", [decoder])
  return {part.get("type", "") for part in parts}


@functools.cache
def _byte_level() -> dict[str, int]:
  """The byte of every character of a byte-level vocabulary (GPT-2).

  Bytes that print stand for themselves, the others for U+0100 and on.
  """
  printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in printing]
  table = {chr(byte): byte for byte in printing}
  return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}
