from __future__ import annotations

import dataclasses
import pathlib
import sys
import types

import pytest

from aquila_jax.core import errors, packages
from aquila_jax.core.experiment_config import SourceConfig
from aquila_jax.data import corpora, sources
from aquila_jax.data.extraction import Entry
from aquila_jax.data.formats import ProblemLog
from aquila_jax.data.sources import OpenSource

_FIELD = "config.data.sources.mine"


def _open(path: object, *, problems: ProblemLog | None = None) -> OpenSource:
  return sources.open_source(
    SourceConfig(path=str(path), language="en"),
    field=_FIELD,
    problems=problems or ProblemLog(),
    progress=_ignore,
  )


def _ignore(message: str) -> None:
  del message


def _message(path: object) -> str:
  with pytest.raises(errors.UserError) as error:
    list(_open(path).documents)
  return str(error.value)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """Text in two places, other files, and hidden ones."""
  root = tmp_path / "text"
  (root / "deep").mkdir(parents=True)
  (root / ".git").mkdir()
  (root / "b.txt").write_text("b")
  (root / "deep" / "a.jsonl").write_text('{"text": "a"}\n')
  (root / "deep" / "c.txt").write_text("c")
  (root / "README.md").write_text("not read")
  (root / ".git" / "d.txt").write_text("hidden")
  (root / ".e.txt").write_text("hidden")
  return root


def test_a_folder_is_read_whole_in_sorted_order(folder):
  opened = _open(folder)
  assert [document.text for document in opened.documents] == ["b", "a", "c"]
  assert opened.ignored_files == 1
  names = [(pathlib.Path(e.path).name, e.bytes) for e in opened.inputs]
  assert names == [("b.txt", 1), ("a.jsonl", 14), ("c.txt", 1)]


def test_a_glob_and_a_file(folder):
  texts = [d.text for d in _open(folder / "**" / "*.txt").documents]
  assert texts == ["b", "c"]
  assert [d.text for d in _open(folder / "b.txt").documents] == ["b"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
  (tmp_path / "a[1].txt").write_text("one")
  assert [d.text for d in _open(tmp_path / "a[1].txt").documents] == ["one"]


def test_a_path_that_leads_nowhere_is_named(folder):
  assert _message(folder / "b.text") == (
    f"{_FIELD}.path='{folder}/b.text': there is no such file or folder; did you"
    f" mean '{folder}/b.txt'?"
  )
  assert _message("/no/where/at/all") == (
    f"{_FIELD}.path='/no/where/at/all': there is no such file or folder"
  )
  assert _message(folder / "*.parquet") == (
    f"{_FIELD}.path='{folder}/*.parquet': no file matches"
  )


def test_a_place_without_text_is_named(tmp_path):
  kinds = ".txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet"
  (tmp_path / "a.md").write_text("x")
  assert _message(tmp_path) == (
    f"{_FIELD}.path='{tmp_path}': no text file in it; expected {kinds}"
  )
  assert _message(tmp_path / "a.md") == (
    f"{_FIELD}.path='{tmp_path}/a.md': expected one of {kinds}"
  )


def test_a_corpus_brings_its_licence(monkeypatch, tmp_path):
  corpus = corpora.CORPORA["jionlp"]
  monkeypatch.setattr(packages, "fetch", lambda corpus, progress: tmp_path)
  corpus = dataclasses.replace(
    corpus, extract=lambda path: iter([Entry("t", "f", 7)])
  )
  monkeypatch.setitem(corpora.CORPORA, "jionlp", corpus)
  opened = _open("corpus:jionlp")
  assert opened.licence == "Apache-2.0"
  assert opened.description.endswith("(jionlp==1.5.31)")
  (document,) = opened.documents
  assert (document.text, document.file, document.line) == ("t", "f", 7)


class _Hub:
  """A stand-in for the package `datasets`."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.asked: list[tuple] = []
    module = types.ModuleType("datasets")
    module.__dict__["load_dataset"] = self.load
    monkeypatch.setitem(sys.modules, "datasets", module)

  def load(self, name, config, *, split, streaming):
    self.asked.append((name, config, split, streaming))
    if name == "gone":
      raise FileNotFoundError("Dataset 'gone' doesn't exist\non the Hub")
    return iter([{"text": "one"}, {"body": "two"}, {"text": "three"}])


@pytest.mark.parametrize(
  ("path", "asked"),
  [
    ("hf:org/name", ("org/name", None, "train", True)),
    ("hf:org/name:zh", ("org/name", "zh", "train", True)),
    ("hf:org/name:zh:test", ("org/name", "zh", "test", True)),
    ("hf:org/name::test", ("org/name", None, "test", True)),
  ],
)
def test_a_hugging_face_dataset_is_streamed(monkeypatch, path, asked):
  hub, log = _Hub(monkeypatch), ProblemLog()
  documents = list(_open(path, problems=log).documents)
  assert [(d.text, d.line) for d in documents] == [("one", 1), ("three", 3)]
  assert list(map(str, log.first)) == [
    f"{path}:2: has no field 'text'; valid: body"
  ]
  assert hub.asked == [asked]


def test_a_dataset_that_is_not_there_is_named(monkeypatch):
  _Hub(monkeypatch)
  assert _message("hf:gone") == (
    f"{_FIELD}.path='hf:gone': Dataset 'gone' doesn't exist"
  )
  assert _message("hf:a:b:c:d") == (
    f"{_FIELD}.path='hf:a:b:c:d': expected hf:NAME, hf:NAME:CONFIG or"
    " hf:NAME:CONFIG:SPLIT"
  )


def test_the_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  assert _message("hf:name") == (
    f"{_FIELD}.path='hf:name': needs the package 'datasets'; pip install"
    " datasets"
  )
