"""Text files that are replaced as a whole: a reader never finds half of one."""

from __future__ import annotations

from etils import epath


def replace_text(path: epath.Path, text: str) -> None:
  """Writes a file beside its place and renames it into it.

  Args:
    path: the file; its folder must exist.
    text: all of the content.
  """
  partial = path.parent / f".{path.name}.partial"
  try:
    partial.write_text(text)
    partial.replace(path)
  except OSError:
    partial.unlink(missing_ok=True)
    raise
