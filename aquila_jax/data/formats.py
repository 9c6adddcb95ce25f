"""Documents out of one file: .txt, .jsonl[.gz|.zst] and .parquet.

Readers stream. What cannot be read goes to a `ProblemLog` with file and line;
the rest of the file is used as far as its format allows.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from aquila_jax.core import errors

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_CHUNK_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and where it begins."""

  text: str
  file: str
  line: int  # from 1; a row of .parquet, 0 where there are no lines


@dataclasses.dataclass(frozen=True)
class Problem:
  """A piece of input that could not be used."""

  file: str
  line: int  # from 1; a row of .parquet, 0 is the whole file
  reason: str

  def __str__(self) -> str:
    place = f"{self.file}:{self.line}" if self.line else self.file
    return f"{place}: {self.reason}"


class ProblemLog:
  """Counts problems and keeps the first, or refuses the very first.

  Args:
    on_bad_input: of `CleaningConfig`.
    keep: how many problems to keep.
  """

  def __init__(
    self, on_bad_input: Literal["skip", "refuse"] = "skip", *, keep: int = 100
  ):
    self._refuse = on_bad_input == "refuse"
    self._keep = keep
    self.count = 0
    self.first: list[Problem] = []

  def add(self, file: str, line: int, reason: str) -> None:
    """Records a problem.

    Raises:
      errors.UserError: where bad input is refused.
    """
    problem = Problem(file, line, reason)
    if self._refuse:
      raise errors.UserError(
        f"{problem}; repair it, or let"
        " config.data.cleaning.on_bad_input='skip' leave it out"
      )
    self.count += 1
    if len(self.first) < self._keep:
      self.first.append(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
  """What a reader needs to know beside the file."""

  text_field: str
  txt_documents: Literal["file", "paragraph"]
  problems: ProblemLog


def suffix(path: pathlib.Path) -> str | None:
  """The suffix of a text file that this module reads, or None."""
  name = path.name.lower()
  # The longest first: ".jsonl.gz" also ends in ".gz".
  return next((end for end in SUFFIXES if name.endswith(end)), None)


def read_file(path: pathlib.Path, options: ReadOptions) -> Iterator[Document]:
  """The documents of one file; an empty file is a problem.

  Args:
    path: with one of `SUFFIXES`.
    options: how to read it.

  Yields:
    Its documents, in order.
  """
  kind = suffix(path)
  assert kind is not None, path
  before = options.problems.count
  found = False
  reader = _READERS[kind]
  try:
    for document in reader(path, options):
      found = True
      yield document
  except OSError as error:
    reason = error.strerror or str(error).splitlines()[0]
    options.problems.add(str(path), 0, f"cannot be read: {reason}")
  if not found and options.problems.count == before:
    options.problems.add(str(path), 0, "is empty")


def _read_txt(path: pathlib.Path, options: ReadOptions) -> Iterator[Document]:
  """Whole files or paragraphs; a line that is not UTF-8 is left out."""
  lines: list[str] = []
  start = 1
  for number, raw in enumerate(_file_lines(path), start=1):
    line = _decode(raw, path, number, options.problems)
    if line is None:
      continue
    blank = not line.strip()
    if options.txt_documents == "paragraph" and blank:
      if lines:
        yield Document("\n".join(lines), str(path), start)
      lines = []
    elif lines or not blank:
      if not lines:
        start = number
      lines.append(line)
  if lines:
    yield Document("\n".join(lines), str(path), start)


def _read_jsonl(
  path: pathlib.Path, options: ReadOptions, lines: Iterator[bytes] | None = None
) -> Iterator[Document]:
  """One JSON object a line; blank lines separate nothing and are no rows."""
  problems = options.problems
  for number, raw in enumerate(lines or _file_lines(path), start=1):
    line = _decode(raw, path, number, problems)
    if line is None or not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      reason = error.msg if isinstance(error, json.JSONDecodeError) else error
      problems.add(str(path), number, f"is not JSON: {reason}")
      continue
    except RecursionError:
      problems.add(str(path), number, "is not JSON: nested too deeply")
      continue
    text = checked_text(row, str(path), number, options=options)
    if text is not None:
      yield Document(text, str(path), number)


def checked_text(
  row: Any, file: str, line: int, *, options: ReadOptions
) -> str | None:
  """The text of a row, or None and a problem where it has none."""
  name = options.text_field
  if not isinstance(row, dict):
    reason = f"is {type(row).__name__}, expected an object with {name!r}"
  elif name not in row:
    reason = f"has no field {name!r}; {errors.nearest(name, map(str, row))}"
  elif not isinstance(row[name], str):
    reason = f"field {name!r} is {type(row[name]).__name__}, expected text"
  elif not _is_unicode(row[name]):
    reason = f"field {name!r} has an unpaired surrogate"
  else:
    return row[name]
  options.problems.add(file, line, reason)
  return None


def _is_unicode(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _read_gzip(path: pathlib.Path, options: ReadOptions) -> Iterator[Document]:
  # Window size 2**15, with the header and checksum of gzip.
  return _read_compressed(path, options, lambda: zlib.decompressobj(16 + 15))


def _read_zstd(path: pathlib.Path, options: ReadOptions) -> Iterator[Document]:
  def frame() -> _Frame:
    return zstandard.ZstdDecompressor().decompressobj()

  return _read_compressed(path, options, frame)


@runtime_checkable
class _Frame(Protocol):
  """One compressed frame, as zlib and zstandard decompress it."""

  def decompress(self, data: bytes, /) -> bytes: ...

  @property
  def eof(self) -> bool: ...

  @property
  def unused_data(self) -> bytes: ...


def _read_compressed(
  path: pathlib.Path, options: ReadOptions, frame: Callable[[], _Frame]
) -> Iterator[Document]:
  """Rows up to the place of damage, if there is any."""
  lines = _DecompressedLines(path, frame)
  yield from _read_jsonl(path, options, iter(lines))
  if lines.damage is not None:
    options.problems.add(
      str(path), lines.count + 1, f"is damaged from here on: {lines.damage}"
    )


class _DecompressedLines:
  """The whole lines of a compressed file, and why they end early."""

  def __init__(self, path: pathlib.Path, frame: Callable[[], _Frame]):
    self._path = path
    self._frame = frame
    self.count = 0
    self.damage: str | None = None

  def __iter__(self) -> Iterator[bytes]:
    rest = b""
    try:
      for chunk in self._chunks():
        *whole, rest = (rest + chunk).split(b"\n")
        self.count += len(whole)
        yield from whole
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
      self.damage = str(error).splitlines()[0]
      return  # `rest` is cut somewhere
    if rest:
      self.count += 1
      yield rest

  def _chunks(self) -> Iterator[bytes]:
    """Decompresses frame by frame; one that is cut short raises EOFError.

    The stream reader of zstandard ends there without a word; that of gzip
    loses what it has read.
    """
    frame = None
    with self._path.open("rb") as file:
      while data := file.read(_CHUNK_BYTES):
        while data:
          frame = frame or self._frame()
          yield frame.decompress(data)
          if not frame.eof:
            break
          # Zeros may fill a file up behind its last frame.
          data, frame = frame.unused_data.lstrip(b"\0"), None
    if frame is not None:
      raise EOFError("the file ends inside a compressed frame")


def _file_lines(path: pathlib.Path) -> Iterator[bytes]:
  with path.open("rb") as file:
    yield from file


def _decode(
  raw: bytes, path: pathlib.Path, number: int, problems: ProblemLog
) -> str | None:
  if number == 1:
    raw = raw.removeprefix(_BYTE_ORDER_MARK)
  try:
    return raw.decode().rstrip("\r\n")
  except UnicodeDecodeError as error:
    byte = raw[error.start]
    problems.add(
      str(path), number, f"is not UTF-8: byte 0x{byte:02x} at {error.start}"
    )
    return None


def _read_parquet(
  path: pathlib.Path, options: ReadOptions
) -> Iterator[Document]:
  """One column of text, a row group at a time; lines are rows from 1."""
  name, problems = options.text_field, options.problems
  row = 0
  try:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
      columns = file.schema_arrow.names
      if name not in columns:
        hint = errors.nearest(name, columns)
        problems.add(str(path), 0, f"has no column {name!r}; {hint}")
        return
      kind = file.schema_arrow.field(name).type
      if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        problems.add(str(path), 0, f"column {name!r} is {kind}, expected text")
        return
      for batch in file.iter_batches(batch_size=1024, columns=[name]):
        for value in batch.column(0):
          row += 1
          text = _parquet_text(value, path, row, problems=problems)
          if text is not None:
            yield Document(text, str(path), row)
  except (pa.ArrowException, OSError) as error:
    reason = str(error).splitlines()[0]
    problems.add(str(path), row + 1, f"is damaged from here on: {reason}")


def _parquet_text(
  value: pa.Scalar, path: pathlib.Path, row: int, *, problems: ProblemLog
) -> str | None:
  try:
    text = value.as_py()
  except UnicodeDecodeError as error:
    problems.add(str(path), row, f"is not UTF-8 at byte {error.start}")
    return None
  if text is None:
    problems.add(str(path), row, "has no text: null")
  return text


_READERS: dict[
  str, Callable[[pathlib.Path, ReadOptions], Iterator[Document]]
] = {
  ".txt": _read_txt,
  ".jsonl": _read_jsonl,
  ".jsonl.gz": _read_gzip,
  ".jsonl.zst": _read_zstd,
  ".parquet": _read_parquet,
}
