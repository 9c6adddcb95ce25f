"""Small JSON files of a workdir, each whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors, files, processes

Record = dict[str, Any]


def write(path: epath.Path, record: Mapping[str, Any]) -> None:
  """Writes a record beside its place and renames it into it.

  Of several processes, the first does.
  """
  if not processes.is_first():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(record, indent=1, ensure_ascii=False)
  files.replace_text(path, text + "\n")


def read(path: epath.Path) -> Record | None:
  """The record, or None where there is none, as the first process finds it.

  Raises:
    errors.UserError: where the file is damaged.
  """
  return processes.from_first(lambda: read_here(path), name=path.name)


def read_here(path: epath.Path) -> Record | None:
  """`read`, by a process for itself."""
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text())
    if not isinstance(record, dict):
      raise ValueError("no object")
  except ValueError as error:
    raise errors.UserError(
      f"{path} is damaged ({error}); delete it to have it made again"
    ) from error
  return record


def plain(tree: Any) -> Any:
  """A tree as JSON gives it back: lists for tuples."""
  return json.loads(json.dumps(config_lib.to_dict(tree)))
