"""A foreign configuration, read key by key: what is used, refused, unknown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from aquila_jax.core import errors

T = TypeVar("T")
_REQUIRED: Any = object()
# What stands for a value that was complained about.
_HARMLESS: dict[type, Any] = {
  bool: True,
  int: 1,
  float: 1.0,
  str: "",
  list: [],
  dict: {},
}


class Fields:
  """The keys of a configuration, with every complaint about them.

  Args:
    tree: the configuration.
    what: the file it is from, for messages.
  """

  def __init__(self, tree: Mapping[str, Any], *, what: str):
    self._tree = tree
    self._what = what
    self._used: set[str] = set()
    self.problems: list[str] = []

  def __contains__(self, name: str) -> bool:
    """Whether the key is there, if only as null."""
    return name in self._tree

  def has(self, name: str) -> bool:
    """Whether the key is there and not null."""
    return self._tree.get(name) is not None

  def take(self, name: str, kind: type[T], default: T | None = _REQUIRED) -> T:
    """The value of a key.

    Args:
      name: the key.
      kind: what it must be; an int is taken for a float, which is finite.
      default: where the key is missing or null; without one it must be there.

    Returns:
      The value. On a complaint, which is kept for later, a harmless one.
    """
    self._used.add(name)
    value = self._tree.get(name)
    if value is None:
      if default is _REQUIRED:
        self.problems.append(f"{name} is missing")
        return _HARMLESS[kind]
      return default  # pyright: ignore[reportReturnType]
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      self.problems.append(f"{name}={value!r}: expected {kind.__name__}")
      return _HARMLESS[kind]
    if isinstance(value, float) and not math.isfinite(value):
      self.problems.append(f"{name}={value!r}: expected a finite number")
      return _HARMLESS[kind]
    return value

  def expect(self, name: str, *values: Any, why: str) -> None:
    """Complains where a key is there and is none of `values`."""
    self._used.add(name)
    value = self._tree.get(name)
    if value is not None and value not in values:
      expected = " or ".join(map(repr, values))
      self.refuse(f"{name}={value!r}: expected {expected}; {why}")

  def refuse(self, problem: str) -> None:
    """Keeps a complaint."""
    self.problems.append(problem)

  def make(self, part: Callable[[], T], *, since: int = 0) -> T | None:
    """What `part` makes of values of these fields.

    Args:
      part: makes it; a ValueError is kept as a complaint.
      since: how many complaints there were when the first value was taken.
        With more of them, the values may not be the file's.

    Returns:
      What was made, or None after a complaint.
    """
    if len(self.problems) > since:
      return None
    try:
      return part()
    except ValueError as error:
      self.refuse(str(error))
      return None

  def ignore(self, *names: str) -> None:
    """Marks keys as known to change no logit."""
    self._used.update(names)

  @property
  def unknown(self) -> list[str]:
    """The keys that nothing asked for."""
    return sorted(set(self._tree) - self._used)

  def check(self) -> None:
    """Raises one error for all complaints.

    Raises:
      errors.UserError: with a line for each.
    """
    if self.problems:
      raise errors.UserError(listed(self._what, self.problems))


def listed(what: str, problems: list[str], *, most: int = 40) -> str:
  """One message for all problems: the first lines of a long list, counted."""
  if len(problems) == 1:
    return f"{what}: {problems[0]}"
  shown = problems[:most]
  lines = [f"{what}: {len(problems)} problems", *(f"  {p}" for p in shown)]
  if len(problems) > most:
    lines.append(f"  and {len(problems) - most} more")
  return "\n".join(lines)
