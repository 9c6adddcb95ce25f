"""A file is replaced as a whole, and nothing stays beside it."""

from __future__ import annotations

import resource

import pytest
from etils import epath

from aquila_jax.core import files


def test_new_text_takes_the_place_of_the_old(tmp_path):
  path = epath.Path(tmp_path) / "a.txt"
  files.replace_text(path, "old")
  files.replace_text(path, "文\n")
  assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "文\n"
  assert [child.name for child in tmp_path.iterdir()] == ["a.txt"]


def test_what_does_not_fit_leaves_the_old_text_and_nothing_beside(tmp_path):
  path = epath.Path(tmp_path) / "a.txt"
  files.replace_text(path, "old")
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      files.replace_text(path, "x" * (1 << 17))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert (tmp_path / "a.txt").read_text() == "old"
  assert [child.name for child in tmp_path.iterdir()] == ["a.txt"]
