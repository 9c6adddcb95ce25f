"""From a DataConfig to a directory of prepared data.

Read and clean every source, drop duplicates, split by document, train or load
the tokenizer, write token shards and the card. Everything is written beside
the place of the result and renamed into it at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from aquila_jax import version
from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  CleaningConfig,
  DataConfig,
  SourceConfig,
)
from aquila_jax.core.packages import Progress
from aquila_jax.data import (
  card,
  cleaning,
  near_duplicates,
  prepared,
  sources,
  token_store,
)
from aquila_jax.data.formats import ProblemLog
from aquila_jax.data.sources import OpenSource
from aquila_jax.data.spool import Spool
from aquila_jax.data.tokenizer import Tokenizer

_SOURCE_NAME = re.compile(r"\w[\w.\-]*", re.ASCII)
# Fields of DataConfig that the prepared data do not depend on.
_UNUSED_FIELDS = ("prepared", "seed")
_ENCODE_CHARACTERS = 1_000_000  # encoded at a time; bounds memory
_DROPPED = -1  # in `_Source.split`; otherwise an index into prepared.SPLITS


@dataclasses.dataclass(kw_only=True)
class _Source:
  """A source on its way through the phases."""

  name: str
  config: SourceConfig
  opened: OpenSource
  problems: ProblemLog
  spool: Spool
  read: int = 0  # documents
  dropped: Counter[str] = dataclasses.field(default_factory=Counter)
  split: Int[np.ndarray, " docs"] = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int64)
  )

  @property
  def field(self) -> str:
    return f"config.data.sources.{self.name}"

  def members(self, split: prepared.Split) -> Int[np.ndarray, " docs"]:
    """Indices of the documents of a split, in the order they were read."""
    return np.flatnonzero(self.split == prepared.SPLITS.index(split))


def prepare(
  config: DataConfig, output: str | os.PathLike[str], *, progress: Progress
) -> None:
  """Writes prepared data, or finds it written.

  Args:
    config: what to prepare.
    output: the directory; made here. Where it holds data of the same config
      and the same files, nothing is done.
    progress: told of each phase and of every source.

  Raises:
    errors.UserError: where the config cannot be prepared, or `output` holds
      something else.
  """
  target = pathlib.Path(output).expanduser()
  if _is_prepared(config, target):
    progress(f"{target} is prepared")
    return
  for name in config.sources:
    if not _SOURCE_NAME.fullmatch(name):
      raise errors.UserError(
        f"config.data.sources: the name {name!r} becomes a folder; expected"
        " letters, digits, '_', '-' and '.'"
      )
  partial = target.parent / f".{target.name}.partial"
  shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed
  try:
    partial.mkdir(parents=True)
  except OSError as error:
    raise errors.UserError(
      f"output={str(target)!r}: cannot be made: {error.strerror}"
    ) from error
  try:
    _write(config, partial, progress)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  progress(f"prepared {target}")


def _write(config: DataConfig, partial: pathlib.Path, progress: Progress):
  """All phases, in order."""
  spools = partial / "spools"
  spools.mkdir()
  with contextlib.ExitStack() as stack:
    read = []
    for name in sorted(config.sources):
      spool = stack.enter_context(contextlib.closing(Spool(spools / name)))
      read.append(_read_source(config, name, spool, progress))
    by_language: dict[str, list[_Source]] = {}
    for source in read:
      by_language.setdefault(source.config.language, []).append(source)
    for language, members in sorted(by_language.items()):
      _drop_duplicates(members, config.cleaning, language, progress)
      _split(members, config, language)
    for source in read:
      _check_training_text(source)
    tokenizer = _make_tokenizer(config, by_language, progress)
    tokenizer.save(partial / prepared.TOKENIZER)
    records = {
      source.name: _write_source(source, partial, tokenizer, progress)
      for source in read
    }
  shutil.rmtree(spools)
  header = _header(config, records, tokenizer)
  text = json.dumps(header, indent=1, ensure_ascii=False)
  (partial / prepared.CARD).write_text(card.render(header), encoding="utf-8")
  (partial / prepared.HEADER).write_text(text, encoding="utf-8")


def _is_prepared(config: DataConfig, target: pathlib.Path) -> bool:
  """Whether `target` holds what `config` asks for.

  Raises:
    errors.UserError: where it holds something else.
  """
  if not target.exists():
    return False
  if not (target / prepared.HEADER).exists():
    if target.is_dir() and not any(target.iterdir()):
      return False
    raise errors.UserError(
      f"{target} exists and is not prepared data; choose another output"
    )
  header = prepared.read_header(target, what="output")
  changed = config_lib.differences(
    header["config"], _identity(config), "config.data"
  )
  if changed:
    raise errors.UserError(
      f"{target} was prepared with another config ({changed[0]}); choose"
      " another output or delete it"
    )
  for changed, field in _changed_files(config, header):
    raise errors.UserError(
      f"{target} was prepared {changed} (config.data.{field}); choose another"
      " output or delete it"
    )
  return True


def _changed_files(
  config: DataConfig, header: dict[str, Any]
) -> Iterator[tuple[str, str]]:
  """How the files of `config` differ from those that data were made of.

  Data may have been moved away from their files: one that is gone has not
  changed.

  Args:
    config: of the data.
    header: dataset.json.

  Yields:
    The difference, and the field below `config.data` that names the file.
  """
  for name, record in header["sources"].items():
    recorded = {entry["path"]: entry["bytes"] for entry in record["inputs"]}
    for path, size in recorded.items():
      file = pathlib.Path(path)
      if file.exists() and file.stat().st_size != size:
        yield f"from another version of {path}", f"sources.{name}"
    files = []
    if recorded:  # none are, where the source is not of local files
      with contextlib.suppress(errors.UserError):
        files, _ = sources.find_files(config.sources[name].path, field="")
    for file in files:
      if str(file) not in recorded:
        yield f"without {file}", f"sources.{name}"
  given = config.tokenizer.path
  if given and pathlib.Path(given).expanduser().exists():
    found = _given_tokenizer(config).digest
    if found != header["tokenizer"]["sha256"]:
      yield f"with another version of {given}", "tokenizer.path"


def _identity(config: DataConfig) -> dict[str, Any]:
  """The fields that the prepared data depend on, as JSON has them."""
  tree = config_lib.to_dict(config)
  kept = {key: tree[key] for key in tree if key not in _UNUSED_FIELDS}
  return json.loads(json.dumps(kept))


def _read_source(
  config: DataConfig, name: str, spool: Spool, progress: Progress
) -> _Source:
  """Reads, cleans and spools the documents of a source."""
  source_config = config.sources[name]
  problems = ProblemLog(config.cleaning.on_bad_input)
  opened = sources.open_source(
    source_config,
    field=f"config.data.sources.{name}",
    problems=problems,
    progress=progress,
  )
  progress(f"reading {name}")
  source = _Source(
    name=name,
    config=source_config,
    opened=opened,
    problems=problems,
    spool=spool,
  )
  taken = 0
  for document in opened.documents:
    source.read += 1
    text = cleaning.clean(document.text)
    if len(text) < config.cleaning.min_characters or not text:
      source.dropped["too short"] += 1
      continue
    size = len(text.encode())
    if source_config.max_bytes and taken + size > source_config.max_bytes:
      source.read -= 1
      break
    taken += source.spool.append(text)
  progress(
    f"{name}: {source.read:,} documents, {taken / 1e6:.1f} MB of clean text"
  )
  if problems.count:
    progress(
      f"warning: {name}: {problems.count:,} pieces of bad input left out, the"
      f" first {problems.first[0]}; the dataset card lists them"
    )
  if opened.ignored_files:
    progress(
      f"warning: {name}: {opened.ignored_files:,} files of other kinds ignored"
    )
  return source


def _drop_duplicates(
  members: list[_Source],
  config: CleaningConfig,
  language: str,
  progress: Progress,
) -> None:
  """Marks exact and then near duplicates among all sources of a language."""
  for source in members:
    source.split = np.zeros(len(source.spool), np.int64)
  if config.exact_duplicates:
    seen: set[bytes] = set()
    for source in members:
      for i, text in enumerate(source.spool):
        key = cleaning.fingerprint(text)
        if key in seen:
          source.split[i] = _DROPPED
          source.dropped["exact duplicate"] += 1
        seen.add(key)
  if config.near_duplicate_threshold < 1:
    _drop_near_duplicates(members, config.near_duplicate_threshold)
  dropped = sum((source.dropped for source in members), Counter())
  progress(
    f"{language}: dropped"
    f" {dropped['exact duplicate']:,} exact and"
    f" {dropped['near duplicate']:,} near duplicates,"
    f" {dropped['too short']:,} short documents"
  )


def _drop_near_duplicates(members: list[_Source], threshold: float) -> None:
  places = [
    (source, int(i))
    for source in members
    for i in np.flatnonzero(source.split != _DROPPED)
  ]

  def text_of(number: int) -> str:
    source, i = places[number]
    return source.spool[i]

  duplicate = near_duplicates.find(
    map(text_of, range(len(places))), threshold=threshold, text_of=text_of
  )
  for number in np.flatnonzero(duplicate):
    source, i = places[int(number)]
    source.split[i] = _DROPPED
    source.dropped["near duplicate"] += 1


def _split(members: list[_Source], config: DataConfig, language: str) -> None:
  """Gives the kept documents of a language their split, by hash of the text.

  Where none falls below a share, the split gets the text with the least hash.
  """
  kept = [source.split != _DROPPED for source in members]
  positions = [
    source.spool.positions[mask]
    for source, mask in zip(members, kept, strict=True)
  ]
  together = np.concatenate(positions)
  different = np.unique(together)
  if len(different) < len(prepared.SPLITS):
    raise errors.UserError(
      f"{members[0].field}: {len(different)} different documents of language"
      f" {language!r} are left after cleaning; need at least"
      f" {len(prepared.SPLITS)}, one a split{_paragraph_hint(members)}"
    )
  validation = together < config.validation_share
  if not validation.any():
    validation = together == different[0]
  test = together < config.validation_share + config.test_share
  test &= ~validation
  # Where everything is held out, no text is left to train on; said later.
  if not test.any() and not validation.all():
    test = together == together[~validation].min()
  split = np.where(validation, 1, np.where(test, 2, 0))
  bounds = np.cumsum([len(part) for part in positions])[:-1]
  for source, mask, part in zip(
    members, kept, np.split(split, bounds), strict=True
  ):
    source.split[mask] = part


def _paragraph_hint(members: list[_Source]) -> str:
  for source in members:
    has_txt = any(e.path.lower().endswith(".txt") for e in source.opened.inputs)
    if has_txt and source.config.txt_documents == "file":
      return f"; try {source.field}.txt_documents='paragraph'"
  return ""


def _check_training_text(source: _Source) -> None:
  if len(source.members("train")):
    return
  reasons = [f"{count:,} {why}" for why, count in source.dropped.items()]
  held_out = int((source.split > 0).sum())
  raise errors.UserError(
    f"{source.field}: no document is left to train on:"
    f" {source.read:,} read, {', '.join([*reasons, f'{held_out:,} held out'])},"
    f" {source.problems.count:,} pieces of bad input"
  )


def _make_tokenizer(
  config: DataConfig,
  by_language: dict[str, list[_Source]],
  progress: Progress,
) -> Tokenizer:
  """Loads the given tokenizer, or trains one on the training text."""
  given = config.tokenizer
  if given.path:
    return _given_tokenizer(config)
  progress(f"training a tokenizer of {given.vocab_size:,} tokens")
  return Tokenizer.train(
    (
      text
      for _, members in sorted(by_language.items())
      for text in _sample(members, given.max_training_bytes)
    ),
    vocab_size=given.vocab_size,
    end_of_text=given.end_of_text,
    field="config.data.tokenizer.vocab_size",
  )


def _given_tokenizer(config: DataConfig) -> Tokenizer:
  return Tokenizer.from_file(
    config.tokenizer.path,
    end_of_text=config.tokenizer.end_of_text,
    field="config.data.tokenizer.path",
  )


def _sample(members: list[_Source], max_bytes: int) -> Iterator[str]:
  """Training documents in the order of their hashes, up to `max_bytes`."""
  places = [
    (source.spool.positions[i], source.name, int(i), source)
    for source in members
    for i in source.members("train")
  ]
  left = max_bytes
  for _, _, i, source in sorted(places, key=lambda place: place[:3]):
    raw = source.spool[i].encode()[:left]
    left -= len(raw)
    yield raw.decode(errors="ignore")  # the last may be cut in a character
    if not left:
      return


def _write_source(
  source: _Source,
  partial: pathlib.Path,
  tokenizer: Tokenizer,
  progress: Progress,
) -> dict[str, Any]:
  """Writes the token shards of a source; its record in dataset.json."""
  dtype = token_store.dtype_for(tokenizer.vocab_size)
  splits = {}
  not_restored = 0
  for split in prepared.SPLITS:
    members = source.members(split)
    text_bytes = int(source.spool.bytes[members].sum())
    folder = partial / split / source.name
    with token_store.StoreWriter(folder, dtype=dtype) as writer:
      for texts in _chunks(source.spool, members):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
          writer.add([tokenizer.end_of_text_id, *ids, tokenizer.end_of_text_id])
          stands_for = int(tokenizer.token_bytes[ids].sum())
          not_restored += stands_for != len(text.encode())
      splits[split] = writer.finish() | {"bytes": text_bytes}
  tokens = {split: record["tokens"] for split, record in splits.items()}
  progress(
    f"{source.name}: "
    + ", ".join(f"{n:,} tokens to {split}" for split, n in tokens.items())
  )
  if not_restored:
    progress(
      f"warning: {source.name}: the tokens of {not_restored:,} documents stand"
      " for another number of bytes than the text has; bits per byte is off"
    )
  licence = source.config.licence
  if licence == SourceConfig.licence:
    licence = source.opened.licence
  return {
    "path": source.config.path,
    "description": source.opened.description,
    "licence": licence,
    "language": source.config.language,
    "weight": source.config.weight,
    "read": source.read,
    "dropped": dict(source.dropped),
    "problems": source.problems.count,
    "first_problems": list(map(dataclasses.asdict, source.problems.first)),
    "ignored_files": source.opened.ignored_files,
    "inputs": list(map(dataclasses.asdict, source.opened.inputs)),
    "documents_not_restored": not_restored,
    "splits": splits,
  }


def _chunks(
  spool: Spool, members: Int[np.ndarray, " docs"]
) -> Iterator[list[str]]:
  """The texts of `members`, about a million characters at a time."""
  texts: list[str] = []
  size = 0
  for i in members:
    texts.append(spool[int(i)])
    size += len(texts[-1])
    if size >= _ENCODE_CHARACTERS:
      yield texts
      texts, size = [], 0
  if texts:
    yield texts


def _header(
  config: DataConfig, records: dict[str, dict[str, Any]], tokenizer: Tokenizer
) -> dict[str, Any]:
  dtype = token_store.dtype_for(tokenizer.vocab_size)
  return {
    "format": prepared.FORMAT,
    "package_version": version.VERSION,
    "digest": prepared.data_digest(records, tokenizer_sha256=tokenizer.digest),
    "dtype": dtype.str,
    "tokenizer": {
      "path": config.tokenizer.path,
      "sha256": tokenizer.digest,
      "vocab_size": tokenizer.vocab_size,
      "end_of_text": tokenizer.end_of_text,
      "end_of_text_id": tokenizer.end_of_text_id,
    },
    "sources": records,
    "config": _identity(config),
  }
