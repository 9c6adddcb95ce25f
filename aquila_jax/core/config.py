"""From a ConfigDict to frozen dataclasses: the one door, for every config.

`build` consumes every key of a nested mapping and refuses leftovers with the
nearest valid name. Below it no code sees a ConfigDict. `to_dict` is the way
back, for files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from aquila_jax.core import errors

T = TypeVar("T")


def build(cls: type[T], tree: Any, *, path: str = "config") -> T:
  """Makes the dataclass `cls` from `tree`, using every key of it.

  Args:
    cls: a frozen dataclass; its fields may be scalars, `Literal`, tuples,
      optionals, `dict[str, Dataclass]`, dataclasses, unions of dataclasses
      that are told apart by a `kind: Literal[...]` field, and unions of a
      `Literal` of words and a tuple of numbers.
    tree: nested mappings, as from `ConfigDict.to_dict` or JSON.
    path: the dotted name of `tree`, for messages.

  Returns:
    An instance of `cls`.

  Raises:
    errors.UserError: on an unknown, missing or ill-typed field, or where a
      dataclass's own `__post_init__` refuses the values; the message has the
      dotted path, the value, what was expected and the nearest valid name.
  """
  if not isinstance(tree, Mapping):
    raise errors.UserError(f"{path}={tree!r}: expected a section of fields")
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
  for key in tree:
    if key not in fields:
      raise errors.UserError(
        f"{path}.{key}={_shown(tree[key])} is not a field of {path};"
        f" {errors.nearest(str(key), fields)}"
      )
  hints = _hints(cls)
  values = {}
  for name, field in fields.items():
    if name in tree:
      values[name] = _convert(hints[name], tree[name], f"{path}.{name}")
    elif _required(field):
      raise errors.UserError(f"{path}.{name} is missing; it has no default")
  try:
    return cls(**values)
  except errors.UserError:
    raise
  except ValueError as error:
    raise errors.UserError(f"{path}: {error}") from error


def to_dict(config: Any) -> Any:
  """The plain nested dict of a dataclass; `build` turns it back."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    return {
      f.name: to_dict(getattr(config, f.name))
      for f in dataclasses.fields(config)
      if f.init
    }
  if isinstance(config, Mapping):
    return {key: to_dict(value) for key, value in config.items()}
  if isinstance(config, tuple | list):
    return [to_dict(value) for value in config]
  return config


def differences(old: Any, new: Any, path: str = "config") -> list[str]:
  """Where two trees of `to_dict` differ, as `path: old -> new`."""
  return [f"{name}: {a!r} -> {b!r}" for name, a, b in changes(old, new, path)]


def changes(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
  """Path and both values of each leaf in which trees of `to_dict` differ."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    for key in sorted({*old, *new}):
      yield from changes(old.get(key), new.get(key), f"{path}.{key}")
  elif old != new:
    yield path, old, new


def require(condition: bool, message: str) -> None:
  """Raises ValueError(message) unless `condition`; for `__post_init__`."""
  if not condition:
    raise ValueError(message)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _required(field: dataclasses.Field[Any]) -> bool:
  return (
    field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  )


def _shown(value: Any) -> str:
  return "{...}" if isinstance(value, Mapping) else repr(value)


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Converts `value` to the annotated type `hint`, or raises UserError."""
  origin = typing.get_origin(hint)
  arguments = typing.get_args(hint)
  if origin in (Union, types.UnionType):
    return _convert_union(arguments, value, path)
  if origin is Literal:
    if value not in arguments:
      names = [str(argument) for argument in arguments]
      raise errors.UserError(
        f"{path}={value!r} is unknown; {errors.nearest(str(value), names)}"
        f" (expected one of {', '.join(names)})"
      )
    return value
  if origin is tuple:
    return _convert_tuple(arguments, value, path)
  if origin is dict:
    if not isinstance(value, Mapping):
      raise errors.UserError(f"{path}={value!r}: expected a section of names")
    return {
      str(key): _convert(arguments[1], item, f"{path}.{key}")
      for key, item in value.items()
    }
  if dataclasses.is_dataclass(hint):
    return build(typing.cast(type, hint), value, path=path)
  return _convert_scalar(hint, value, path)


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
  options = [argument for argument in arguments if argument is not type(None)]
  if value is None and len(options) < len(arguments):
    return None
  if len(options) == 1:
    return _convert(options[0], value, path)
  if not all(map(dataclasses.is_dataclass, options)):
    return _convert_word_or_numbers(options, value, path)
  by_kind = {_kind(option): option for option in options}
  if not isinstance(value, Mapping) or "kind" not in value:
    raise errors.UserError(
      f"{path}.kind is missing; valid: {', '.join(sorted(by_kind))}"
    )
  kind = value["kind"]
  if kind not in by_kind:
    raise errors.unknown_name(f"{path}.kind", kind, by_kind)
  return build(by_kind[kind], value, path=path)


def _convert_word_or_numbers(options: list[Any], value: Any, path: str) -> Any:
  """A word of the Literal, or the tuple; as a text `1,3` it is one as well."""
  literal, numbers = sorted(
    options, key=lambda o: typing.get_origin(o) is tuple
  )
  words = typing.get_args(literal)
  if isinstance(value, tuple | list) and value:
    if all(isinstance(item, str) for item in value):
      value = ",".join(value)  # an override that was taken for a list of words
  if value in words:
    return value
  if isinstance(value, str):
    parts = value.strip("()[] ").rstrip(",").split(",")
    if all(part.strip().isdecimal() for part in parts):
      value = tuple(int(part) for part in parts)
  if not isinstance(value, tuple | list):
    raise errors.UserError(
      f"{path}={value!r}: expected one of {', '.join(words)}, or numbers"
    )
  return _convert_tuple(typing.get_args(numbers), value, path)


def _kind(option: type) -> str:
  return typing.get_args(_hints(option)["kind"])[0]


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
  if not isinstance(value, tuple | list):
    raise errors.UserError(f"{path}={value!r}: expected a tuple")
  if len(arguments) == 2 and arguments[1] is Ellipsis:
    return tuple(
      _convert(arguments[0], item, f"{path}[{i}]")
      for i, item in enumerate(value)
    )
  if len(value) != len(arguments):
    raise errors.UserError(
      f"{path}={value!r}: expected {len(arguments)} values"
    )
  return tuple(
    _convert(argument, item, f"{path}[{i}]")
    for i, (argument, item) in enumerate(zip(arguments, value, strict=True))
  )


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise errors.UserError(
      f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}"
    )
  if hint is float and not math.isfinite(value):
    raise errors.UserError(f"{path}={value!r}: expected a finite number")
  return value
