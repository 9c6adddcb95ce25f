"""Errors that say that nothing more can be written, whoever raises them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from aquila_jax.core import errors

# No space, a quota, and the largest size of a file (RLIMIT_FSIZE).
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def why_full(error: BaseException) -> str | None:
  """Why nothing more could be written, if that is what an error comes from.

  Args:
    error: an OSError, or an error of TensorStore, which has the system's words
      in its message; or raised from one.

  Returns:
    The system's words, or None.
  """
  seen: BaseException | None = error
  while seen is not None:
    text = str(seen)
    for number in _FULL:
      words = os.strerror(number)
      is_of_system = isinstance(seen, OSError) and seen.errno == number
      # What was to be opened may stand between the two.
      is_of_tensorstore = f"{words} [" in text and f"='{number}']" in text
      if is_of_system or is_of_tensorstore:
        return words
    seen = seen.__cause__ or seen.__context__
  return None


def as_full(
  error: BaseException, what: str | os.PathLike[str]
) -> errors.DiskFull | None:
  """The one error for the commands' users, where an error is of a full disk.

  Args:
    error: as of `why_full`; a file that it names is what could not be written.
    what: could not be written otherwise.

  Returns:
    What to raise or to say; None where something else is the matter.
  """
  reason = why_full(error)
  if reason is None:
    return None
  what = getattr(error, "filename", None) or os.fspath(what)
  return errors.DiskFull(
    f"{what} could not be written: {reason}; free some space, and run the same"
    " command again"
  )


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what a full disk makes of the body into one error.

  Args:
    path: what the body writes, or a directory around it; an error that names
      something already keeps that.

  Raises:
    errors.DiskFull: naming the path.
  """
  try:
    yield
  except errors.DiskFull:
    raise
  except Exception as error:
    full = as_full(error, path)
    if full is None:
      raise
    raise full from error
