"""What a whole checkpoint holds: size and CRC-32 of every file of a step.

Orbax verifies no array bytes, and a chunk of zeros has no file that could be
missed. A step's manifest is written when all of its files are, and before the
step is renamed into its place: a step without one is not whole.

Two files are Orbax's own and come later. _CHECKPOINT_METADATA must be JSON (its
times decide nothing), commit_success.txt must be there.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

NAME = "MANIFEST.json"
# For Orbax to keep beside a step. What has neither this nor a manifest is of a
# version of this package that wrote none.
MARK = {"manifest": NAME}
_METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"

_CHUNK_BYTES = 1 << 20
_THREADS = 8  # reading and CRC-32 do not hold Python's lock


class _Damaged(Exception):
  """Names a file of a step and says what is wrong with it."""


def write(step: epath.Path) -> None:
  """Writes the manifest of a directory whose files are all there."""
  names = sorted(set(_names(step)) - {_METADATA, _COMMITTED})
  files = dict(zip(names, _sums(step, names), strict=True))
  manifest = {"files": files, "crc32": zlib.crc32(json.dumps(files).encode())}
  with (step / NAME).open("w") as file:
    file.write(json.dumps(manifest, indent=1) + "\n")
    file.flush()
    if "://" not in os.fspath(step):
      os.fsync(file.fileno())


def is_of_before(step: epath.Path) -> bool:
  """Whether a step was saved by a version that wrote no manifests."""
  if (step / NAME).exists():
    return False
  try:
    metadata = _read_object(step, _METADATA)
  except _Damaged:
    return False
  return (metadata.get("custom_metadata") or {}).get("manifest") is None


def fault(step: epath.Path) -> str | None:
  """The first file of a step that is not as it was saved, and why, or None."""
  try:
    _read_object(step, _METADATA)
    if not (step / _COMMITTED).exists():
      raise _Damaged(f"{_COMMITTED} is missing")
    manifest = _read_object(step, NAME)
    files = manifest.get("files", {})
    if zlib.crc32(json.dumps(files).encode()) != manifest.get("crc32"):
      raise _Damaged(f"{NAME} differs from its own checksum")
    _compare(step, files)
  except _Damaged as damaged:
    return str(damaged)
  return None


def _compare(step: epath.Path, files: dict[str, list[int]]) -> None:
  found = set(_names(step)) - {_METADATA, _COMMITTED, NAME}
  for name in sorted(files.keys() | found):
    if name not in found:
      raise _Damaged(f"{name} is missing")
    if name not in files:
      raise _Damaged(f"{name} is not of this step")
    size, expected = (step / name).stat().length, files[name][0]
    if size != expected:
      raise _Damaged(f"{name} has {size} bytes instead of {expected}")
  names = sorted(files)
  for name, (_, crc32) in zip(names, _sums(step, names), strict=True):
    if crc32 != files[name][1]:
      raise _Damaged(
        f"{name} has the CRC-32 {crc32:08x} instead of {files[name][1]:08x}"
      )


def _names(step: epath.Path) -> list[str]:
  """Of all files of a step, relative to it."""
  return [
    (folder / file).relative_to(step).as_posix()
    for folder, _, files in step.walk()
    for file in files
  ]


def _sums(step: epath.Path, names: list[str]) -> list[tuple[int, int]]:
  """Size and CRC-32 of files, in their order."""
  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(lambda name: _sum(step / name), names))


def _sum(path: epath.Path) -> tuple[int, int]:
  size, crc32 = 0, 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK_BYTES):
      size, crc32 = size + len(chunk), zlib.crc32(chunk, crc32)
  return size, crc32


def _read_object(step: epath.Path, name: str) -> dict[str, Any]:
  path = step / name
  if not path.exists():
    raise _Damaged(f"{name} is missing")
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise _Damaged(f"{name} is no JSON") from error
  if not isinstance(found, dict):
    raise _Damaged(f"{name} is no JSON object")
  return found
