"""Files that are replaced as a whole: a reader never finds half of one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from absl import logging
from etils import epath

_TRIES = 20  # to remove what may still be written


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


def remove_failed(what: epath.Path, remove: Callable[[], None]) -> None:
  """Removes what was being written while other threads may still write into it.

  Args:
    what: for the message, where it does not go away.
    remove: raises OSError where something has been added meanwhile.
  """
  for _ in range(_TRIES):
    try:
      return remove()
    except OSError as error:
      logging.info("once more: %s", error)
      time.sleep(0.1)
  logging.warning("%s: remains of what could not be written are left", what)
