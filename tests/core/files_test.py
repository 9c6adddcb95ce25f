"""A file is replaced as a whole, and nothing stays beside it."""

from __future__ import annotations

from etils import epath

from aquila_jax.core import files


def test_new_text_takes_the_place_of_the_old(tmp_path):
  path = epath.Path(tmp_path) / "a.txt"
  files.replace_text(path, "old")
  files.replace_text(path, "文\n")
  assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "文\n"
  assert [child.name for child in tmp_path.iterdir()] == ["a.txt"]
