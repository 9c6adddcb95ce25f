from __future__ import annotations

import pytest

from aquila_jax.data import cleaning
from aquila_jax.data.spool import Spool

_TEXTS = ["one", "", "天地\n玄黄", "🙂 two", "one"]


@pytest.fixture
def spool(tmp_path):
  spool = Spool(tmp_path / "spool")
  yield spool
  spool.close()


def test_texts_come_back_in_any_order(spool):
  lengths = [spool.append(text) for text in _TEXTS]
  # 3 bytes a Chinese character, 4 an emoji.
  assert lengths == [3, 0, 13, 8, 3]
  assert len(spool) == 5
  assert [spool[i] for i in (4, 2, 0, 3, 1)] == [
    "one",
    *_TEXTS[2::-2],
    *_TEXTS[3::-2],
  ]
  assert list(spool) == _TEXTS


def test_reading_between_appends_loses_nothing(spool):
  for i, text in enumerate(_TEXTS):
    spool.append(text)
    assert list(spool) == _TEXTS[: i + 1]
    assert spool[i] == text
    # The last thing that is read is far from the end.
    assert spool[0] == "one"


def test_lengths_and_positions_are_those_of_the_texts(spool):
  for text in _TEXTS:
    spool.append(text)
  assert spool.bytes.tolist() == [len(text.encode()) for text in _TEXTS]
  assert spool.positions.tolist() == [cleaning.position(t) for t in _TEXTS]


def test_an_empty_spool_has_no_texts(spool):
  assert (len(spool), list(spool)) == (0, [])
  assert spool.bytes.tolist() == spool.positions.tolist() == []


def test_the_file_holds_nothing_but_the_texts(spool, tmp_path):
  for text in _TEXTS:
    spool.append(text)
  spool.close()
  assert (tmp_path / "spool").read_bytes() == "".join(_TEXTS).encode()
