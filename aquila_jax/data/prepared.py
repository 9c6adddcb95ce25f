"""Prepared data: a directory of token shards, its tokenizer and its card.

  DATA/
    dataset.json                      config, counts, digests
    DATASET_CARD.md                   the same for people
    tokenizer.json
    train|validation|test/SOURCE/     a token store (token_store.py)

A stored document is end_of_text, its tokens, end_of_text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from aquila_jax.core import errors
from aquila_jax.data import token_store
from aquila_jax.data.token_store import TokenStore
from aquila_jax.data.tokenizer import Tokenizer

FORMAT = 1
HEADER = "dataset.json"
CARD = "DATASET_CARD.md"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Data of fewer bytes is verified whenever it is opened.
_VERIFY_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedSource:
  """One source: its share of the mixture and its documents."""

  name: str
  language: str
  weight: float
  splits: dict[Split, TokenStore]

  def documents(self, split: Split = "train") -> int:
    return self.splits[split].num_documents

  def tokens(self, split: Split = "train") -> int:
    return self.splits[split].num_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
  """Tokenized text: on disk, or made in memory for an evaluation."""

  sources: dict[str, PreparedSource]
  tokenizer_text: str  # of tokenizer.json
  digest: str  # identity of tokens, tokenizer and mixture
  card: dict[str, Any]  # dataset.json
  path: pathlib.Path | None = None  # None in memory

  @classmethod
  def open(
    cls, path: str | os.PathLike[str], *, what: str = "data"
  ) -> PreparedData:
    """Opens what prepare_data wrote.

    Args:
      path: the directory.
      what: the flag or field that named it, for messages.

    Returns:
      The data, verified against its digests where it is below 1 GiB.

    Raises:
      errors.UserError: where the directory is missing, not whole, or damaged.
    """
    folder = pathlib.Path(path).expanduser()
    header = read_header(folder, what=what)
    dtype = np.dtype(header["dtype"])
    sources = {
      name: PreparedSource(
        name=name,
        language=record["language"],
        weight=record["weight"],
        splits={
          split: token_store.open_store(
            folder / split / name, record["splits"][split], dtype=dtype
          )
          for split in SPLITS
        },
      )
      for name, record in sorted(header["sources"].items())
    }
    tokenizer_file = folder / TOKENIZER
    if not tokenizer_file.exists():
      raise errors.UserError(
        f"{tokenizer_file} is missing; prepare the data again"
      )
    try:
      tokenizer_text = tokenizer_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise _damaged(tokenizer_file) from error
    data = cls(
      sources=sources,
      tokenizer_text=tokenizer_text,
      digest=header["digest"],
      card=header,
      path=folder,
    )
    if _stored_bytes(header) < _VERIFY_BYTES:
      data.verify()
    return data

  def verify(self) -> None:
    """Compares every file with its SHA-256.

    Raises:
      errors.UserError: where one differs; it names the file.
    """
    if self.path is None:
      return
    for name, record in self.card["sources"].items():
      for split in SPLITS:
        token_store.verify(self.path / split / name, record["splits"][split])
    digest = hashlib.sha256(self.tokenizer_text.encode()).hexdigest()
    if digest != self.card["tokenizer"]["sha256"]:
      raise _damaged(self.path / TOKENIZER)

  @functools.cached_property
  def languages(self) -> tuple[str, ...]:
    """Sorted; a batch gives a language as an index into them."""
    return tuple(sorted({s.language for s in self.sources.values()}))

  def tokenizes_as(self, tokenizer_text: str | None) -> bool:
    """Whether a MODEL's tokenizer.json is the tokenizer of this data.

    What stands in front of a text does not count: data has end_of_text there,
    an imported tokenizer may have nothing.
    """
    return tokenizer_text is not None and self.tokenizer().equals(
      tokenizer_text
    )

  def tokenizer(self) -> Tokenizer:
    return self._tokenizer

  @functools.cached_property
  def _tokenizer(self) -> Tokenizer:
    what = str(self.path / TOKENIZER) if self.path else TOKENIZER
    return Tokenizer.from_text(self.tokenizer_text, what=what)

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.vocab_size

  @property
  def token_bytes(self) -> Int[np.ndarray, " V"]:
    """Bytes of UTF-8 that each token stands for; 0 for special tokens."""
    return self._tokenizer.token_bytes

  @property
  def end_of_text_id(self) -> int:
    return self._tokenizer.end_of_text_id

  def tokens(self, split: Split = "train") -> int:
    """Tokens of a split, end_of_text among them."""
    return sum(source.tokens(split) for source in self.sources.values())


def read_header(folder: pathlib.Path, *, what: str) -> dict[str, Any]:
  """dataset.json of a whole directory of prepared data.

  Raises:
    errors.UserError: where it is missing or of another format.
  """
  if not folder.is_dir():
    raise errors.UserError(
      f"{what}={str(folder)!r}: there is no such directory; make it with"
      " prepare_data"
    )
  header_file = folder / HEADER
  if not header_file.exists():
    raise errors.UserError(
      f"{what}={str(folder)!r} is not prepared data: it has no {HEADER}"
    )
  try:
    header = json.loads(header_file.read_text(encoding="utf-8"))
    found = header["format"]
  except (ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{header_file} is damaged; prepare the data again"
    ) from error
  if found != FORMAT:
    raise errors.UserError(
      f"{header_file}: format {found}, this version reads {FORMAT}"
    )
  return header


def data_digest(
  records: dict[str, dict[str, Any]], *, tokenizer_sha256: str
) -> str:
  """The identity of data: of its tokens, its tokenizer and its mixture.

  Args:
    records: of dataset.json, one a source.
    tokenizer_sha256: of tokenizer.json.

  Returns:
    A hexadecimal SHA-256.
  """
  identity = {
    name: {
      "language": record["language"],
      "weight": record["weight"],
      "splits": {
        split: [
          entry["sha256"] for entry in (store["lengths"], *store["shards"])
        ]
        for split, store in record["splits"].items()
      },
    }
    for name, record in records.items()
  }
  text = json.dumps([identity, tokenizer_sha256], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: pathlib.Path) -> errors.UserError:
  return errors.UserError(
    f"{path} is damaged: its SHA-256 differs from {HEADER}; prepare the data"
    " again"
  )


def _stored_bytes(header: dict[str, Any]) -> int:
  return sum(
    entry["bytes"]
    for record in header["sources"].values()
    for store in record["splits"].values()
    for entry in (store["lengths"], *store["shards"])
  )
