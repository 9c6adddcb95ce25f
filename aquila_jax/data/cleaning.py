"""Clean text, and the documents to leave out: too short, or seen before."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# Control characters, byte-order marks, zero-width characters and
# noncharacters; not newline and tab, nor the joiners that scripts and emoji
# need.
_INVISIBLE = re.compile(
  "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb"
  "\ufffe\uffff]"
)
_NEW_LINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
  """Unicode NFC, no invisible characters, plain spaces and newlines.

  Spaces at line ends go, more than one blank line becomes one, and the ends
  are stripped; indentation stays.
  """
  # What stood between a letter and its accent must be gone before they compose.
  text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
  text = _SPACE.sub(" ", _NEW_LINE.sub("\n", text))
  text = _BLANK_LINES.sub("\n\n", _LINE_END.sub("", text))
  return text.strip()


def comparable(text: str) -> str:
  """The form in which documents are compared: no case, single spaces."""
  return " ".join(text.casefold().split())


def fingerprint(text: str) -> bytes:
  """16 bytes that equal texts share, and no others."""
  return hashlib.blake2b(comparable(text).encode(), digest_size=16).digest()


def position(text: str) -> float:
  """A number in [0, 1) that depends on nothing but the text.

  Documents below a share of it make a split of that share.
  """
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
