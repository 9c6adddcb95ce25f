"""A MODEL and prepared data, made once, and the commands to run on them."""

from __future__ import annotations

import os
import pathlib

import pytest

from aquila_jax.data.prepare import prepare
from tests.cli import tiny
from tests.cli.commands import ROOT, Commands


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Commands:
  """All with one cache, also those of other workers of pytest-xdist."""
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  return Commands(shared / "xla")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> pathlib.Path:
  """Prepared data of the smoke config."""
  path = tmp_path_factory.mktemp("cli") / "data"
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)  # where the sources of the config lie
    prepare(tiny.experiment().data, path, progress=lambda line: None)
  return path


@pytest.fixture(scope="session")
def dense(data) -> pathlib.Path:
  """A dense MODEL with optimizer state; not to be written to."""
  path = data.parent / "dense"
  tiny.save(path, tiny.stored((data / "tokenizer.json").read_text()))
  return path
