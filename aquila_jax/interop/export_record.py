"""aquila_jax.json: what an export knows that config.json has no key for.

The training options of the architecture and the lineage. With it the import of
an export is the model that was exported; stock tools do not read it. It counts
only as long as config.json says what it said at the export.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.interop import families
from aquila_jax.interop.hf_directory import read_json

NAME = "aquila_jax.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """The content of the file."""

  config: ModelConfig
  lineage: Lineage


def write(directory: pathlib.Path, record: Record) -> None:
  """Writes aquila_jax.json."""
  tree = {
    "format": _FORMAT,
    "model": config_lib.to_dict(record.config),
    "lineage": record.lineage.to_json(),
  }
  (directory / NAME).write_text(json.dumps(tree, indent=2) + "\n")


def read(
  directory: pathlib.Path, *, config_tree: Mapping[str, Any]
) -> Record | None:
  """Reads aquila_jax.json, where there is one.

  Args:
    directory: of the export.
    config_tree: the content of its config.json.

  Returns:
    The record, or None.

  Raises:
    errors.UserError: where it is damaged, or config.json was changed since.
  """
  file = directory / NAME
  if not file.is_file():
    return None
  tree = read_json(file)
  try:
    if tree["format"] != _FORMAT:
      raise errors.UserError(
        f"{file}: format {tree['format']}, this version reads {_FORMAT}"
      )
    config = config_lib.build(ModelConfig, tree["model"], path=f"{file}:model")
    record = Record(config=config, lineage=Lineage.from_json(tree["lineage"]))
  except (KeyError, TypeError) as error:
    raise errors.UserError(
      f"{file} is damaged: {type(error).__name__}: {error}"
    ) from error
  _, written = families.write_config(config)
  for name, value in written.items():
    if config_tree.get(name) != value:
      raise errors.UserError(
        f"{directory / 'config.json'}: {name}={config_tree.get(name)!r}, but"
        f" {NAME} was written with {value!r}; delete {NAME} to go by"
        " config.json"
      )
  return record
