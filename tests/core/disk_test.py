from __future__ import annotations

import errno

import pytest

from aquila_jax.core import disk, errors, model_dir


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
  of_opening = ValueError(
    f"RESOURCE_EXHAUSTED: Failed to write 511 bytes to file 27: {words}"
    f" [tensorstore_spec='{{}}'] [os_error_code='{number}']"
  )
  assert disk.why_full(of_opening) == words
  try:
    raise RuntimeError("saving failed") from of_tensorstore
  except RuntimeError as error:
    assert disk.why_full(error) == words


def test_other_errors_are_not_of_a_full_disk():
  assert disk.why_full(OSError(errno.EACCES, "Permission denied")) is None
  assert disk.why_full(ValueError("No space left on device")) is None


def test_what_could_not_be_written_is_named_once(tmp_path):
  unnamed = OSError(errno.ENOSPC, "No space left on device")
  named = OSError(errno.ENOSPC, "No space left on device", "a/file")
  end = (
    "could not be written: No space left on device; free some space, and run"
    " the same command again"
  )
  for error, what in ((unnamed, tmp_path), (named, "a/file")):
    with pytest.raises(errors.DiskFull) as found:
      with disk.naming("outer"), disk.naming(tmp_path):
        raise error
    assert str(found.value) == f"{what} {end}"
  with pytest.raises(KeyError), disk.naming(tmp_path):
    raise KeyError


@pytest.mark.parametrize("begun", [False, True])
def test_of_a_directory_that_has_no_room_nothing_is_left(
  begun, tmp_path, monkeypatch
):
  full = OSError(errno.ENOSPC, "No space left on device")

  def no_room(*_, **__):
    raise full

  if not begun:
    monkeypatch.setattr("os.mkdir", no_room)
    monkeypatch.setattr("os.makedirs", no_room)
  with pytest.raises(errors.DiskFull) as error:
    with model_dir.new_directory(tmp_path / "new") as partial:
      (partial / "half").write_text("")
      raise full
  assert str(error.value).startswith(f"{tmp_path / 'new'} could not be written")
  assert list(tmp_path.iterdir()) == []
