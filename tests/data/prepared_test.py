from __future__ import annotations

import copy
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.data import prepared
from aquila_jax.data.prepared import PreparedData

_FILES = (
  "tokenizer.json",
  "train/essays/documents.bin",
  "train/essays/tokens-00000.bin",
  "validation/notes/tokens-00000.bin",
  "test/poems/documents.bin",
)


@pytest.fixture
def folder(three_sources, tmp_path) -> pathlib.Path:
  """A copy that a test may damage."""
  return shutil.copytree(three_sources.path, tmp_path / "copy")


def _message(folder: pathlib.Path, **fields: str) -> str:
  with pytest.raises(errors.UserError) as error:
    PreparedData.open(folder, **fields)
  return str(error.value)


def test_a_copy_opens_as_the_same_data(three_sources, folder):
  data = PreparedData.open(str(folder))
  assert data.digest == three_sources.digest
  assert data.path == folder
  assert data.languages == ("en", "zh")
  weights = {name: s.weight for name, s in data.sources.items()}
  assert weights == {"essays": 3.0, "notes": 1.0, "poems": 2.0}
  for name, source in data.sources.items():
    for split in prepared.SPLITS:
      ours, theirs = source.splits[split], three_sources.sources[name].splits
      assert ours.lengths.tolist() == theirs[split].lengths.tolist()
      assert np.array_equal(ours.shards[0], theirs[split].shards[0])


def test_counts_are_those_of_the_files(three_sources):
  header = json.loads((three_sources.path / "dataset.json").read_text())
  for split in prepared.SPLITS:
    total = 0
    for name, source in three_sources.sources.items():
      folder = three_sources.path / split / name
      # 2 bytes a token, 8 a document.
      tokens = (folder / "tokens-00000.bin").stat().st_size // 2
      documents = (folder / "documents.bin").stat().st_size // 8
      assert source.tokens(split) == tokens
      assert source.documents(split) == documents
      record = header["sources"][name]["splits"][split]
      assert (record["tokens"], record["documents"]) == (tokens, documents)
      total += tokens
    assert three_sources.tokens(split) == total


def test_the_tokenizer_is_that_of_the_data(three_sources):
  tokenizer = three_sources.tokenizer()
  assert tokenizer is three_sources.tokenizer()
  assert three_sources.vocab_size == tokenizer.vocab_size == 300
  assert three_sources.end_of_text_id == tokenizer.end_of_text_id == 0
  assert three_sources.token_bytes.tolist() == tokenizer.token_bytes.tolist()


def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(three_sources):
  for source in three_sources.sources.values():
    for store in source.splits.values():
      tokens = np.concatenate(store.shards)
      assert three_sources.token_bytes[tokens].sum() == store.text_bytes > 0


@pytest.mark.parametrize("name", _FILES)
def test_a_missing_file_is_named(folder, name):
  (folder / name).unlink()
  assert (
    _message(folder) == f"{folder / name} is missing; prepare the data again"
  )


@pytest.mark.parametrize("name", _FILES[1:])
def test_a_truncated_store_is_named(folder, name):
  size = (folder / name).stat().st_size
  (folder / name).write_bytes((folder / name).read_bytes()[:-1])
  assert _message(folder) == (
    f"{folder / name} has {size - 1} bytes, expected {size}; prepare the data"
    " again"
  )


def _damaged(path: pathlib.Path) -> str:
  return (
    f"{path} is damaged: its SHA-256 differs from dataset.json; prepare the"
    " data again"
  )


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_one_wrong_bit_is_found(folder, name, bit):
  content = bytearray((folder / name).read_bytes())
  content[len(content) // 2] ^= bit
  (folder / name).write_bytes(content)
  assert _message(folder) == _damaged(folder / name)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_tokenizer_is_named(folder, share):
  path = folder / "tokenizer.json"
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  assert _message(folder) == _damaged(path)


def test_large_data_is_verified_when_asked(folder, monkeypatch):
  monkeypatch.setattr(prepared, "_VERIFY_BYTES", 0)
  PreparedData.open(folder).verify()
  path = folder / "test/notes/tokens-00000.bin"
  content = bytearray(path.read_bytes())
  content[0] ^= 1
  path.write_bytes(content)
  data = PreparedData.open(folder)
  with pytest.raises(errors.UserError) as error:
    data.verify()
  assert str(error.value) == _damaged(path)


def test_a_damaged_tokenizer_of_large_data_is_named(folder, monkeypatch):
  monkeypatch.setattr(prepared, "_VERIFY_BYTES", 0)
  path = folder / "tokenizer.json"
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(errors.UserError) as error:
    _ = PreparedData.open(folder).vocab_size
  assert str(error.value).startswith(f"{path} is no tokenizer.json: ")
  content = bytearray(path.read_bytes())
  content[50] |= 0x80
  path.write_bytes(content)
  assert _message(folder) == _damaged(path)


def test_a_directory_that_is_no_data_is_named(tmp_path):
  assert _message(tmp_path / "no", what="config.data.prepared") == (
    f"config.data.prepared='{tmp_path}/no': there is no such directory; make it"
    " with prepare_data"
  )
  assert _message(tmp_path) == (
    f"data='{tmp_path}' is not prepared data: it has no dataset.json"
  )


@pytest.mark.parametrize(
  "content", [b"", b'{"format": 1', b"[1]", b'{"a": 1}', b'{"format": \xff}']
)
def test_a_damaged_header_is_named(folder, content):
  path = folder / "dataset.json"
  path.write_bytes(content)
  assert _message(folder) == f"{path} is damaged; prepare the data again"


def test_data_of_another_format_is_refused(folder):
  path = folder / "dataset.json"
  header = json.loads(path.read_text())
  path.write_text(json.dumps(header | {"format": 2}))
  assert _message(folder) == f"{path}: format 2, this version reads 1"


def test_the_digest_is_of_tokens_tokenizer_and_mixture(three_sources):
  records = three_sources.card["sources"]
  sha256 = three_sources.card["tokenizer"]["sha256"]

  def digest(change) -> str:
    changed = copy.deepcopy(records)
    change(changed)
    return prepared.data_digest(changed, tokenizer_sha256=sha256)

  def rename(changed) -> None:
    changed["letters"] = changed.pop("notes")

  def touch(entry) -> None:
    entry["sha256"] = hashlib.sha256(b"other").hexdigest()

  assert digest(lambda _: None) == three_sources.digest
  # Where the text came from, and what the order of the sources in a dict is.
  assert three_sources.digest == digest(
    lambda changed: changed["notes"].update(path="x", licence="y", read=0)
  )
  assert three_sources.digest == prepared.data_digest(
    dict(reversed(records.items())), tokenizer_sha256=sha256
  )
  different = [
    three_sources.digest,
    prepared.data_digest(records, tokenizer_sha256="0" * 64),
    digest(rename),
    digest(lambda changed: changed["notes"].update(weight=2.0)),
    digest(lambda changed: changed["notes"].update(language="zh")),
    digest(lambda c: touch(c["notes"]["splits"]["test"]["lengths"])),
    digest(lambda c: touch(c["notes"]["splits"]["test"]["shards"][0])),
  ]
  assert len(set(different)) == len(different)
