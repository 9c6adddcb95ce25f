"""Errors that a user can act on: one line, the field, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake in what the user gave; the commands print it and exit with 2.

  The message is one line and says what was given, what was expected, and the
  name to change.
  """


class TrainingStopped(Exception):
  """The run stopped by itself, for a reason that is not a user's mistake.

  A non-finite loss is the usual one. The commands print it and exit with 3.
  """


class DiskFull(Exception):
  """Nothing more could be written; what was written before stands.

  The commands print it and exit with 4.
  """


def nearest(name: str, valid: Iterable[str]) -> str:
  """`; did you mean 'x'?`, or the whole list where nothing is near."""
  valid = sorted(valid)
  close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
  if close:
    return f"did you mean {close[0]!r}?"
  if not valid:
    return "there is none"
  return "valid: " + ", ".join(valid)


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UserError:
  """The error for a name that is not one of `valid`."""
  return UserError(f"{what}={name!r} is unknown; {nearest(name, valid)}")
