"""The one door of configs: a file and `--config.a.b=value`, checked, frozen.

A file is a module with get_config() -> ConfigDict. An override may set any
field, also one that the file leaves at its default or in a section that it does
not have; the typed dataclasses of core/ then refuse what is unknown. (That is
why ml_collections' own flags are not used: they set only what the file names.)
Behind the door there is no ConfigDict.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ExperimentConfig

_OVERRIDE = re.compile(r"--?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_overrides: list[tuple[str, str]] = []


def take_overrides(argv: Sequence[str]) -> list[str]:
  """Takes `--config.a.b=value` and `--config.a.b value` off a command line.

  Args:
    argv: the command line.

  Returns:
    The rest of it. `load` applies what was taken.
  """
  _overrides.clear()
  rest = []
  arguments = iter(argv)
  for argument in arguments:
    found = _OVERRIDE.fullmatch(argument)
    if found is None:
      rest.append(argument)
      continue
    path, value = found.groups()
    _overrides.append((path, next(arguments, "") if value is None else value))
  return rest


def overrides() -> list[tuple[str, str]]:
  """What `take_overrides` took: dotted paths and values as text, in order."""
  return list(_overrides)


def define_flag(*, required: bool = True) -> flags.FlagHolder:
  """Defines --config, for the commands that take one."""
  return flags.DEFINE_string(
    "config",
    None,
    "An experiment config: a Python file with get_config(). Any field is set by"
    " --config.a.b=value.",
    required=required,
  )


def load(flag: flags.FlagHolder) -> ExperimentConfig:
  """The experiment of --config with its overrides.

  Args:
    flag: of `define_flag`.

  Returns:
    The frozen config.

  Raises:
    errors.UserError: on a file that is missing or no config, or a field that is
      unknown, ill-typed or out of range.
  """
  return load_file(flag.value, _overrides)


def load_file(
  path: str, overrides: Sequence[tuple[str, str]] = ()
) -> ExperimentConfig:
  """The experiment of a config file.

  Args:
    path: of the file.
    overrides: dotted paths and values as text, in order.

  Returns:
    The frozen config.

  Raises:
    errors.UserError: as `load`.
  """
  config = _unshared(_get_config(path))
  defaults = _with_defaults(config)
  for name, text in overrides:
    _set(config, name, text, defaults=defaults)
  config.lock()
  return config_lib.build(ExperimentConfig, config.to_dict())


def _get_config(path: str) -> ConfigDict:
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    near = [str(other) for other in file.parent.glob("*.py")]
    hint = f"; {errors.nearest(path, near)}" if near else ""
    raise errors.UserError(f"--config={path!r}: there is no such file{hint}")
  module = _import(file, path)
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"--config={path!r}: it has no get_config()")
  config = module.get_config()
  if not isinstance(config, ConfigDict):
    raise errors.UserError(
      f"--config={path!r}: get_config() gave a {type(config).__name__};"
      " expected an ml_collections.ConfigDict"
    )
  return config


def _unshared(config: ConfigDict) -> ConfigDict:
  """A copy in which no two sections are one.

  A dict that a file puts into two places is one ConfigDict in both, and an
  override of the one place would change the other. References stay.
  """
  values = config.items(preserve_field_references=True)
  return ConfigDict(
    {
      name: _unshared(value) if isinstance(value, ConfigDict) else value
      for name, value in values
    }
  )


def _import(file: pathlib.Path, path: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location("experiment_config", file)
  if spec is None or spec.loader is None:
    raise errors.UserError(f"--config={path!r}: expected a Python file (.py)")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise errors.UserError(
      f"--config={path!r}: line {error.lineno}: {error.msg}"
    ) from error
  except ImportError as error:
    raise errors.UserError(f"--config={path!r}: {error}") from error
  return module


def _with_defaults(config: ConfigDict) -> dict[str, Any]:
  """Every field of a file's config, where it is whole without overrides."""
  try:
    built = config_lib.build(ExperimentConfig, config.to_dict())
  except errors.UserError:
    return config.to_dict()
  return config_lib.to_dict(built)


def _set(
  config: ConfigDict, name: str, text: str, *, defaults: dict[str, Any]
) -> None:
  """Sets one field, making the sections on the way that are not there.

  Raises:
    errors.UserError: where the way leads through a value, or to a stage that
      does not exist.
  """
  *sections, field = name.split(".")
  node = config
  for i, section in enumerate(sections):
    if sections[:i] == ["stages"] and section not in node:
      raise errors.UserError(
        f"--config.{name}: there is no stage {section!r};"
        f" {errors.nearest(section, node)}"
      )
    if section not in node or node[section] is None:
      with node.unlocked(), node.ignore_type():
        node[section] = ConfigDict()
    node = node[section]
    if not isinstance(node, ConfigDict):
      way = ".".join(sections[: i + 1])
      raise errors.UserError(
        f"--config.{name}: config.{way}={node!r} is a value, not a section"
      )
  old: Any = defaults
  for part in name.split("."):
    old = old.get(part) if isinstance(old, dict) else None
  with node.unlocked(), node.ignore_type():
    node[field] = _value(text, old=old)


def _value(text: str, *, old: Any) -> Any:
  """What `text` means in the place of `old`; the types are checked later."""
  if isinstance(old, str):
    return text
  words = {"true": True, "false": False, "none": None, "null": None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError):
    value = text
  if isinstance(old, tuple | list) and not isinstance(value, tuple | list):
    return tuple(text.split(","))  # a,b,c
  return value
