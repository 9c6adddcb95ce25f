"""Files that are replaced as a whole: a reader never finds half of one."""

from __future__ import annotations

from etils import epath


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a file beside its place and renames it into it.

  Args:
    path: the file; its folder must exist.
    text: all of the content.
  """
  replace_bytes(path, text.encode())


def replace_bytes(path: epath.Path, content: bytes) -> None:
  """As `replace_text`, of bytes."""
  partial = path.parent / f".{path.name}.partial"
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
