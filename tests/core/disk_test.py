from __future__ import annotations

import errno

import pytest

from aquila_jax.core import disk


@pytest.mark.parametrize(
  "number, words",
  [
    (errno.ENOSPC, "No space left on device"),
    (errno.EDQUOT, "Disk quota exceeded"),
    (errno.EFBIG, "File too large"),
  ],
)
def test_it_is_found_in_errors_of_the_system_and_of_tensorstore(number, words):
  assert disk.why_full(OSError(number, words, "file")) == words
  of_tensorstore = ValueError(
    'OUT_OF_RANGE: Error writing local file "/x/c/0/0": Failed to write 17'
    f" bytes to file 3: {words} [os_error_code='{number}']"
  )
  assert disk.why_full(of_tensorstore) == words
  try:
    raise RuntimeError("saving failed") from of_tensorstore
  except RuntimeError as error:
    assert disk.why_full(error) == words


def test_other_errors_are_not_of_a_full_disk():
  assert disk.why_full(OSError(errno.EACCES, "Permission denied")) is None
  assert disk.why_full(ValueError("No space left on device")) is None
