"""Files that are replaced as a whole: a reader never finds half of one."""

from __future__ import annotations

import os

from etils import epath


def has_rename(path: epath.Path) -> bool:
  """Whether a directory can take its name in one instant: not on gs://."""
  return "://" not in os.fspath(path)


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a file beside its place and renames it into it.

  Where there is no rename a file is whole or not there anyway.

  Args:
    path: the file; its folder must exist.
    text: all of the content.
  """
  replace_bytes(path, text.encode())


def replace_bytes(path: epath.Path, content: bytes) -> None:
  """As `replace_text`, of bytes."""
  if not has_rename(path):
    path.write_bytes(content)
    return
  partial = path.parent / f".{path.name}.partial"
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
