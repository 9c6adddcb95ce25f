"""Documents as token ids on disk: memory-mapped shards and their lengths.

  FOLDER/documents.bin       int64, tokens of every document
  FOLDER/tokens-00000.bin    uint16 or uint32, the documents one after another

All little endian. A document lies in one shard.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from aquila_jax.core import errors, packages

_SHARD_BYTES = 256 * 2**20
_LENGTHS = "documents.bin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStore:
  """The documents of one source in one split, as one long row of tokens."""

  shards: tuple[np.ndarray, ...]
  lengths: np.ndarray  # int64 [docs]; tokens of every document
  # Document by document; where a store was not read from a file, its texts'.
  text_bytes: int = 0

  @functools.cached_property
  def offsets(self) -> Int[np.ndarray, "{self.num_documents}+1"]:
    """Where each document begins; the last entry is the end."""
    return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

  @functools.cached_property
  def _shard_offsets(self) -> Int[np.ndarray, "{len(self.shards)}+1"]:
    sizes = [len(shard) for shard in self.shards]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

  @property
  def num_documents(self) -> int:
    return len(self.lengths)

  @property
  def num_tokens(self) -> int:
    return int(self.offsets[-1])

  def read(self, document: int, start: int, stop: int) -> np.ndarray:
    """Tokens start..stop-1 of a document."""
    first = int(self.offsets[document])
    shard = 0
    if len(self.shards) > 1:
      shard = int(np.searchsorted(self._shard_offsets, first, side="right")) - 1
      # An empty document may stand where a shard ends.
      shard = min(shard, len(self.shards) - 1)
    first -= int(self._shard_offsets[shard])
    return self.shards[shard][first + start : first + stop]


def in_memory(
  documents: Sequence[Sequence[int]], text_bytes: int
) -> TokenStore:
  """A store of token ids that are in memory."""
  lengths = np.array([len(document) for document in documents], np.int64)
  tokens = np.fromiter((t for d in documents for t in d), np.uint32)
  return TokenStore(shards=(tokens,), lengths=lengths, text_bytes=text_bytes)


def dtype_for(vocab_size: int) -> np.dtype:
  """The narrowest stored type that holds every id."""
  return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class StoreWriter:
  """Writes a store document by document; a context that closes its files.

  Args:
    folder: made here.
    dtype: of the stored ids.
    shard_bytes: after which a new shard begins.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    dtype: np.dtype,
    shard_bytes: int = _SHARD_BYTES,
  ):
    folder.mkdir(parents=True)
    self._folder = folder
    self._dtype = dtype
    self._shard_bytes = shard_bytes
    self._lengths: list[int] = []
    self._files: list[dict[str, Any]] = []
    self._file: _HashedFile | None = None

  def __enter__(self) -> StoreWriter:
    return self

  def __exit__(self, *error: object) -> None:
    if self._file is not None:
      self._file.close()

  def add(self, tokens: Iterable[int]) -> None:
    """Appends a document."""
    raw = np.asarray(tokens, self._dtype).tobytes()
    if self._file is None or self._file.bytes + len(raw) > self._shard_bytes:
      self._finish_shard()
      name = f"tokens-{len(self._files):05d}.bin"
      self._file = _HashedFile(self._folder / name)
    self._file.write(raw)
    self._lengths.append(len(raw) // self._dtype.itemsize)

  def _finish_shard(self) -> None:
    if self._file is not None:
      self._files.append(self._file.finish())
      self._file = None

  def finish(self) -> dict[str, Any]:
    """Closes the files; the record with which `open_store` opens them."""
    self._finish_shard()
    lengths = _HashedFile(self._folder / _LENGTHS)
    lengths.write(np.array(self._lengths, "<i8").tobytes())
    return {
      "documents": len(self._lengths),
      "tokens": sum(self._lengths),
      "lengths": lengths.finish(),
      "shards": self._files,
    }


class _HashedFile:
  """A file whose digest is known when its last byte is written."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._file = path.open("wb")
    self._digest = hashlib.sha256()
    self.bytes = 0

  def write(self, raw: bytes) -> None:
    self._file.write(raw)
    self._digest.update(raw)
    self.bytes += len(raw)

  def close(self) -> None:
    self._file.close()

  def finish(self) -> dict[str, Any]:
    self.close()
    return {
      "file": self._path.name,
      "bytes": self.bytes,
      "sha256": self._digest.hexdigest(),
    }


def open_store(
  folder: pathlib.Path, record: dict[str, Any], *, dtype: np.dtype
) -> TokenStore:
  """Maps a store into memory.

  Args:
    folder: of the store.
    record: what `StoreWriter.finish` returned.
    dtype: of the stored ids.

  Returns:
    The store.

  Raises:
    errors.UserError: where a file is missing or of another size.
  """
  for entry in (record["lengths"], *record["shards"]):
    path = folder / entry["file"]
    if not path.exists():
      raise errors.UserError(f"{path} is missing; prepare the data again")
    size = path.stat().st_size
    if size != entry["bytes"]:
      raise errors.UserError(
        f"{path} has {size} bytes, expected {entry['bytes']}; prepare the data"
        " again"
      )
  return TokenStore(
    shards=tuple(
      np.memmap(folder / entry["file"], dtype, "r")
      for entry in record["shards"]
    ),
    lengths=np.fromfile(folder / record["lengths"]["file"], "<i8"),
    text_bytes=record["bytes"],
  )


def verify(folder: pathlib.Path, record: dict[str, Any]) -> None:
  """Compares every file with its SHA-256.

  Raises:
    errors.UserError: where one differs.
  """
  for entry in (record["lengths"], *record["shards"]):
    path = folder / entry["file"]
    if packages.file_sha256(path) != entry["sha256"]:
      raise errors.UserError(
        f"{path} is damaged: its SHA-256 differs from dataset.json; prepare the"
        " data again"
      )
