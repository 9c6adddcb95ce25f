from __future__ import annotations

import gzip
import pathlib
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from aquila_jax.core import errors
from aquila_jax.data import formats
from aquila_jax.data.formats import Document, Problem, ProblemLog, ReadOptions

_ROWS = b'{"text": "one"}\n{"text": "\xe4\xb8\x80"}\n\n{"text": "three"}\n'
_TEXTS = [("one", 1), ("一", 2), ("three", 4)]


def _read(
  path: pathlib.Path,
  *,
  text_field: str = "text",
  txt_documents: Literal["file", "paragraph"] = "file",
) -> tuple[list[tuple[str, int]], list[tuple[int, str]]]:
  """Texts with lines, and problems with lines."""
  log = ProblemLog()
  options = ReadOptions(
    text_field=text_field, txt_documents=txt_documents, problems=log
  )
  documents = list(formats.read_file(path, options))
  assert {d.file for d in documents} | {p.file for p in log.first} <= {
    str(path)
  }
  assert log.count == len(log.first)
  return (
    [(d.text, d.line) for d in documents],
    [(p.line, p.reason) for p in log.first],
  )


def test_a_txt_file_is_one_document(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbf\r\none\r\n\r\ntwo\r\n")
  assert _read(path) == ([("one\n\ntwo\n".removesuffix("\n"), 2)], [])


def test_paragraphs_of_a_txt_file_are_documents(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one\nmore\n\n \n\ntwo\n\n")
  texts, problems = _read(path, txt_documents="paragraph")
  assert (texts, problems) == ([("one\nmore", 1), ("two", 6)], [])


def test_a_bad_line_of_a_txt_file_is_left_out(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"one\nab\xffc\ntwo\n\x80\n")
  assert _read(path) == (
    [("one\ntwo", 1)],
    [
      (2, "is not UTF-8: byte 0xff at 2"),
      (4, "is not UTF-8: byte 0x80 at 0"),
    ],
  )


@pytest.mark.parametrize("txt_documents", ["file", "paragraph"])
@pytest.mark.parametrize("content", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_a_txt_file_without_text_is_a_problem(tmp_path, txt_documents, content):
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  assert _read(path, txt_documents=txt_documents) == ([], [(0, "is empty")])


@pytest.mark.parametrize(
  ("name", "compress"),
  [
    ("a.jsonl", bytes),
    ("a.JSONL.GZ", gzip.compress),
    ("a.jsonl.zst", zstandard.compress),
  ],
)
def test_rows_of_json(tmp_path, name, compress):
  path = tmp_path / name
  path.write_bytes(compress(_ROWS))
  assert _read(path) == (_TEXTS, [])


def test_several_frames_of_zstd_are_one_file(tmp_path):
  path = tmp_path / "a.jsonl.zst"
  frames = [zstandard.compress(_ROWS[:20]), zstandard.compress(_ROWS[20:])]
  path.write_bytes(b"".join(frames))
  assert _read(path) == (_TEXTS, [])


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b'{"text": "x"', "is not JSON: Expecting ',' delimiter"),
    (b"[" * 100_000, "is not JSON: nested too deeply"),
    (b'["x"]', "is list, expected an object with 'text'"),
    (b'{"txt": "x"}', "has no field 'text'; did you mean 'txt'?"),
    (b'{"text": 3}', "field 'text' is int, expected text"),
    (b'{"text": null}', "field 'text' is NoneType, expected text"),
    (b'{"text": "\\ud800"}', "field 'text' has an unpaired surrogate"),
    (b'{"text": "\xc3"}', "is not UTF-8: byte 0xc3 at 10"),
  ],
)
def test_a_bad_row_is_left_out(tmp_path, line, reason):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
  assert _read(path) == ([("one", 1), ("two", 3)], [(2, reason)])


def _zstd_blocks(rows: bytes) -> bytes:
  """One frame of many blocks; no row is given out before its block is whole."""
  frame, size = zstandard.ZstdCompressor().compressobj(), 5000
  parts = [
    frame.compress(rows[start : start + size])
    + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    for start in range(0, len(rows), size)
  ]
  return b"".join(parts) + frame.flush()


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize(
  ("name", "compress"),
  [
    # Stored, not compressed, so that rows stand in front of the cut.
    ("a.jsonl.gz", lambda rows: gzip.compress(rows, compresslevel=0)),
    ("a.jsonl.zst", _zstd_blocks),
  ],
)
def test_rows_before_a_cut_are_read(tmp_path, name, compress, frames):
  path = tmp_path / name
  whole = compress(_ROWS * 5000)
  path.write_bytes(whole * (frames - 1) + whole[: len(whole) // 2])
  texts, ((line, reason),) = _read(path)
  assert texts[:3] == _TEXTS
  assert {text for text, _ in texts} == {"one", "一", "three"}
  # Four lines are three rows; rows of the frame that is cut are read too.
  assert line >= texts[-1][1]
  assert 15_000 * (frames - 1) < len(texts) < 15_000 * frames
  assert reason == (
    "is damaged from here on: the file ends inside a compressed frame"
  )


def test_a_checksum_of_gzip_is_verified(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  content = bytearray(gzip.compress(_ROWS))
  content[-8] ^= 1
  path.write_bytes(bytes(content))
  reason = "Error -3 while decompressing data: incorrect data check"
  assert _read(path) == ([], [(1, f"is damaged from here on: {reason}")])


def test_zeros_behind_a_frame_are_no_damage(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(gzip.compress(_ROWS) + bytes(100))
  assert _read(path) == (_TEXTS, [])


def test_a_file_that_is_not_gzip_is_a_problem(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  path.write_bytes(b"plain text")
  reason = "Error -3 while decompressing data: incorrect header check"
  assert _read(path) == ([], [(1, f"is damaged from here on: {reason}")])


def test_a_file_that_is_not_zstd_is_a_problem(tmp_path):
  path = tmp_path / "a.jsonl.zst"
  path.write_bytes(b"plain text")
  texts, ((line, reason),) = _read(path)
  assert (texts, line) == ([], 1)
  assert reason.startswith("is damaged from here on: zstd decompress")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl"])
def test_an_empty_file_is_a_problem(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"")
  assert _read(path) == ([], [(0, "is empty")])


def _parquet(path: pathlib.Path, **columns: pa.Array) -> pathlib.Path:
  pq.write_table(pa.table(columns), path, row_group_size=2)
  return path


def test_a_column_of_parquet(tmp_path):
  body = pa.array(["one", "一", None, "four"])
  path = _parquet(tmp_path / "a.parquet", body=body, n=pa.array([1, 2, 3, 4]))
  assert _read(path, text_field="body") == (
    [("one", 1), ("一", 2), ("four", 4)],
    [(3, "has no text: null")],
  )


def test_bad_utf8_in_a_column_of_parquet(tmp_path):
  raw = pa.array([b"one", b"a\xff"], pa.binary()).view(pa.string())
  path = _parquet(tmp_path / "a.parquet", text=raw)
  assert _read(path) == ([("one", 1)], [(2, "is not UTF-8 at byte 1")])


@pytest.mark.parametrize(
  ("column", "reason"),
  [
    ({"txt": pa.array(["x"])}, "has no column 'text'; did you mean 'txt'?"),
    ({"text": pa.array([1])}, "column 'text' is int64, expected text"),
    ({"text": pa.array([], pa.string())}, "is empty"),
  ],
)
def test_a_parquet_file_without_text_is_a_problem(tmp_path, column, reason):
  path = _parquet(tmp_path / "a.parquet", **column)
  assert _read(path) == ([], [(0, reason)])


def test_a_damaged_parquet_file_is_a_problem(tmp_path):
  path = _parquet(tmp_path / "a.parquet", text=pa.array(["one"] * 4))
  path.write_bytes(path.read_bytes()[:-9])
  texts, ((line, reason),) = _read(path)
  assert (texts, line) == ([], 1)
  assert reason.startswith("is damaged from here on: Parquet magic bytes not")


def test_a_file_that_vanishes_is_a_problem(tmp_path):
  assert _read(tmp_path / "a.txt") == (
    [],
    [(0, "cannot be read: No such file or directory")],
  )


def test_refusal_names_file_and_line(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"one\n\xff\n")
  options = ReadOptions(
    text_field="text",
    txt_documents="file",
    problems=ProblemLog("refuse"),
  )
  with pytest.raises(errors.UserError) as error:
    list(formats.read_file(path, options))
  assert str(error.value) == (
    f"{path}:2: is not UTF-8: byte 0xff at 0; repair it, or let"
    " config.data.cleaning.on_bad_input='skip' leave it out"
  )


def test_a_log_counts_all_and_keeps_the_first():
  log = ProblemLog(keep=2)
  for line in range(5):
    log.add("f", line, "bad")
  assert log.count == 5
  assert list(map(str, log.first)) == ["f: bad", "f:1: bad"]
  assert log.first[1] == Problem("f", 1, "bad")


def test_suffixes():
  names = {"a.txt": ".txt", "b.jsonl.gz": ".jsonl.gz", "c.gz": None, "d": None}
  for name, expected in names.items():
    assert formats.suffix(pathlib.Path(name)) == expected


def test_a_document_says_where_it_is():
  assert Document("t", "f", 3) == Document(text="t", file="f", line=3)
