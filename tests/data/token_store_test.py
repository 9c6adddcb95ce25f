from __future__ import annotations

import hashlib
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.data import token_store
from aquila_jax.data.token_store import StoreWriter, TokenStore

_U2 = np.dtype("<u2")
# Of 3, 1, 4, 2 and 5 tokens; ids that need both bytes.
_DOCUMENTS = [
  [1, 2, 3],
  [40_000],
  [5, 6, 7, 65_535],
  [0, 9],
  [10, 11, 12, 13, 14],
]


def _write(
  folder: pathlib.Path, *, shard_bytes: int, dtype: np.dtype = _U2
) -> dict[str, Any]:
  writer = StoreWriter(folder, dtype=dtype, shard_bytes=shard_bytes)
  for document in _DOCUMENTS:
    writer.add(document)
  return writer.finish() | {"bytes": 77}


def _assert_holds(store: TokenStore, documents: list[list[int]]):
  """Every part of every document, and the counts."""
  assert store.num_documents == len(documents)
  assert store.num_tokens == sum(map(len, documents))
  starts = [0, *itertools.accumulate(map(len, documents))]
  assert store.offsets.tolist() == starts
  for i, document in enumerate(documents):
    for start in range(len(document) + 1):
      for stop in range(start, len(document) + 1):
        assert store.read(i, start, stop).tolist() == document[start:stop]


@pytest.mark.parametrize(
  ("shard_bytes", "sizes"),
  [
    # At 2 bytes a token; a document is not cut, a long one has its own shard.
    (1000, [30]),
    (8, [8, 8, 4, 10]),
    (12, [8, 12, 10]),
    (1, [6, 2, 8, 4, 10]),
  ],
)
def test_documents_come_back_from_any_number_of_shards(
  tmp_path, shard_bytes, sizes
):
  record = _write(tmp_path / "store", shard_bytes=shard_bytes)
  assert [entry["bytes"] for entry in record["shards"]] == sizes
  store = token_store.open_store(tmp_path / "store", record, dtype=_U2)
  _assert_holds(store, _DOCUMENTS)
  assert store.text_bytes == 77


def test_empty_documents_may_stand_where_a_shard_ends():
  store = TokenStore(
    shards=(np.array([1, 2], _U2), np.array([3], _U2)),
    lengths=np.array([0, 2, 0, 0, 1, 0], np.int64),
  )
  _assert_holds(store, [[], [1, 2], [], [], [3], []])


def test_the_files_are_as_described(tmp_path):
  folder = tmp_path / "deep" / "store"
  record = _write(folder, shard_bytes=12, dtype=np.dtype("<u4"))
  shards = [f"tokens-0000{i}.bin" for i in range(5)]
  assert sorted(path.name for path in folder.iterdir()) == [
    "documents.bin",
    *shards,
  ]
  raw = b"".join((folder / name).read_bytes() for name in shards)
  expected = [t.to_bytes(4, "little") for d in _DOCUMENTS for t in d]
  assert raw == b"".join(expected)
  lengths = [n.to_bytes(8, "little") for n in (3, 1, 4, 2, 5)]
  assert (folder / "documents.bin").read_bytes() == b"".join(lengths)
  assert (record["documents"], record["tokens"]) == (5, 15)
  for entry in (record["lengths"], *record["shards"]):
    content = (folder / entry["file"]).read_bytes()
    assert entry["bytes"] == len(content)
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_an_empty_store_has_no_shard(tmp_path):
  record = StoreWriter(tmp_path / "store", dtype=_U2).finish() | {"bytes": 0}
  assert record["shards"] == []
  store = token_store.open_store(tmp_path / "store", record, dtype=_U2)
  _assert_holds(store, [])
  token_store.verify(tmp_path / "store", record)


def test_a_store_in_memory_is_a_store():
  documents = [[1, 2], [], [70_000, 4, 5]]
  store = token_store.in_memory(documents, 12)
  _assert_holds(store, documents)
  assert store.text_bytes == 12
  _assert_holds(token_store.in_memory([], 0), [])


def test_an_id_that_does_not_fit_is_not_stored(tmp_path):
  writer = StoreWriter(tmp_path / "store", dtype=_U2)
  with pytest.raises(OverflowError):
    writer.add([65_536])


def test_ids_are_stored_in_two_bytes_where_they_fit():
  # The largest id is one less than the vocabulary.
  assert token_store.dtype_for(65_536) == np.dtype("<u2")
  assert token_store.dtype_for(65_537) == np.dtype("<u4")


@pytest.mark.parametrize("name", ["documents.bin", "tokens-00001.bin"])
def test_a_missing_or_cut_file_is_not_opened(tmp_path, name):
  folder = tmp_path / "store"
  record = _write(folder, shard_bytes=12)
  path = folder / name
  content = path.read_bytes()
  path.write_bytes(content[:-2])
  with pytest.raises(errors.UserError) as error:
    token_store.open_store(folder, record, dtype=_U2)
  assert str(error.value) == (
    f"{path} has {len(content) - 2} bytes, expected {len(content)}; prepare the"
    " data again"
  )
  path.unlink()
  with pytest.raises(errors.UserError) as error:
    token_store.open_store(folder, record, dtype=_U2)
  assert str(error.value) == f"{path} is missing; prepare the data again"


@pytest.mark.parametrize("name", ["documents.bin", "tokens-00001.bin"])
def test_one_wrong_bit_is_found(tmp_path, name):
  folder = tmp_path / "store"
  record = _write(folder, shard_bytes=12)
  token_store.verify(folder, record)
  content = bytearray((folder / name).read_bytes())
  content[5] ^= 1
  (folder / name).write_bytes(content)
  with pytest.raises(errors.UserError) as error:
    token_store.verify(folder, record)
  assert str(error.value) == (
    f"{folder / name} is damaged: its SHA-256 differs from dataset.json;"
    " prepare the data again"
  )
