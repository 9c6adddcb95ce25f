"""The MODEL directory: the only thing that verbs hand to each other.

  MODEL/
    config.json      format, package version, architecture, lineage
    tokenizer.json   of the text it was trained on; an imported model may have
                     come without one
    params/          one zarr3 directory a leaf (array_store.py)
    optimizer/       Adam's mu, nu and count, unless left out
    ema/             averaged parameters, where training kept them

A directory is written beside its place and renamed into it at the end. Where
there is no rename (gs://) it is written in its place, and its config.json, the
last file, marks it as whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from aquila_jax import version
from aquila_jax.core import (
  array_store,
  axes,
  config,
  disk,
  dtypes,
  errors,
  files,
  processes,
)
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.moments import AdamMoments
from aquila_jax.core.types import Params

FORMAT = 1
_COUNT_AXES = axes.LeafAxes(())
_COUNT = jax.ShapeDtypeStruct((), jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModel:
  """A model as it stands on disk."""

  config: ModelConfig
  lineage: Lineage
  params: Params
  # The text of tokenizer.json; None of an import that had none.
  tokenizer: str | None
  moments: AdamMoments | None = None
  ema: Params | None = None
  # Ids that end a text, where an imported model names them; none is the
  # tokenizer's end of text.
  stop_tokens: tuple[int, ...] = ()
  # The id that an imported model names as the beginning of a text, whether its
  # tokenizer puts it there or not.
  begin_token: int | None = None
  # Jinja, of an imported model that was trained on conversations.
  chat_template: str | None = None


def save_model(path: str | os.PathLike[str], model: StoredModel, *, axes: Any):
  """Writes a MODEL directory, whole or not at all.

  Of several processes all call it, the first writes, and it is there when they
  go on.

  Args:
    path: the directory; it must not exist.
    model: what to write; its arrays may be spread over processes.
    axes: the declared axes of the parameters, for the chunks.

  Raises:
    errors.UserError: where `path` exists.
    errors.DiskFull: naming it.
  """
  if processes.is_first():
    with new_directory(path) as partial:
      _write_arrays(partial, model, axes=axes)
      _write_texts(partial, model)
  else:
    with disk.naming(path):
      _write_arrays(epath.Path(path), model, axes=axes)
  processes.barrier("wrote a model")


def _write_arrays(directory: epath.Path, model: StoredModel, *, axes: Any):
  array_store.write_tree(directory / "params", model.params, axes=axes)
  if model.moments is not None:
    array_store.write_tree(
      directory / "optimizer",
      _moments_tree(model.moments),
      axes={"mu": axes, "nu": axes, "count": _COUNT_AXES},
    )
  if model.ema is not None:
    array_store.write_tree(directory / "ema", model.ema, axes=axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWriter:
  """The trees of a MODEL that is being written."""

  params: array_store.TreeWriter
  optimizer: array_store.TreeWriter | None  # leaves mu.*, nu.* and count
  ema: array_store.TreeWriter | None


@contextlib.contextmanager
def writing(
  path: str | os.PathLike[str],
  model: StoredModel,
  *,
  axes: Any,
  with_optimizer: bool = False,
  with_ema: bool = False,
) -> Iterator[ModelWriter]:
  """Writes a MODEL directory slice by slice, whole or not at all.

  Args:
    path: the directory; it must not exist.
    model: what to write, its `params` as shapes; without moments and average.
    axes: the declared axes of the parameters, for the chunks.
    with_optimizer: whether moments will be written.
    with_ema: whether an average will be written.

  Yields:
    The writers; every element of every leaf must be written once.

  Raises:
    errors.UserError: where `path` exists.
  """
  assert model.moments is None and model.ema is None
  wide = _widened(model.params)
  with new_directory(path) as partial:
    writer = ModelWriter(
      params=array_store.TreeWriter(
        partial / "params", model.params, axes=axes
      ),
      optimizer=array_store.TreeWriter(
        partial / "optimizer",
        {"mu": wide, "nu": wide, "count": _COUNT},
        axes={"mu": axes, "nu": axes, "count": _COUNT_AXES},
      )
      if with_optimizer
      else None,
      ema=array_store.TreeWriter(partial / "ema", wide, axes=axes)
      if with_ema
      else None,
    )
    yield writer
    for tree in (writer.params, writer.optimizer, writer.ema):
      if tree is not None:
        tree.close()
    _write_texts(partial, model)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
  """A directory beside `path` that takes its name at the end.

  Where the body raises, nothing is left of it. Where there is no rename it is
  `path` itself, and the body writes config.json last.

  Raises:
    errors.UserError: where `path` exists, cannot be made, or is being written.
    errors.DiskFull: naming it.
  """
  target = epath.Path(path).expanduser()
  whole = _renamed if files.has_rename(target) else _in_place
  with disk.naming(target), whole(target) as place:
    yield place


@contextlib.contextmanager
def _renamed(target: epath.Path) -> Iterator[epath.Path]:
  partial = target.parent / f".{target.name}.partial"
  try:
    partial.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"{target}: cannot be made: {error.strerror}"
    ) from error
  with _alone(partial, target=target):
    if target.exists():
      partial.rmtree()
      raise errors.UserError(f"{target} exists; choose another output")
    for left in partial.iterdir():  # by a writer that was killed
      left.rmtree() if left.is_dir() else left.unlink()
    try:
      yield partial
      partial.rename(target)
    except BaseException:  # Ctrl-C too
      files.remove_failed(target, partial.rmtree)
      raise


@contextlib.contextmanager
def _in_place(target: epath.Path) -> Iterator[epath.Path]:
  """A directory that its config.json makes whole, and nothing if that fails."""
  if (target / "config.json").exists():
    raise errors.UserError(f"{target} exists; choose another output")
  if target.exists():  # by a writer that was killed
    target.rmtree()
  target.mkdir(parents=True)
  try:
    yield target
  except BaseException:  # Ctrl-C too
    files.remove_failed(target, target.rmtree)
    raise


@contextlib.contextmanager
def _alone(partial: epath.Path, *, target: epath.Path) -> Iterator[None]:
  """Holds a local directory against other writers of the same output."""
  with contextlib.ExitStack() as stack:
    try:
      held = os.open(partial, os.O_RDONLY)
      stack.callback(os.close, held)
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # What was opened may have taken its name, or be gone, meanwhile.
      taken = not os.path.samestat(os.fstat(held), os.stat(partial))
    except OSError:
      taken = True
    if taken:
      raise errors.UserError(f"{target} is being written by another process")
    yield


def _write_texts(directory: epath.Path, model: StoredModel) -> None:
  """The tokenizer and, last, the header."""
  if model.tokenizer is not None:
    (directory / "tokenizer.json").write_text(model.tokenizer)
  (directory / "config.json").write_text(json.dumps(_header(model), indent=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
  """What config.json says of a MODEL."""

  config: ModelConfig
  lineage: Lineage
  has_tokenizer: bool
  stop_tokens: tuple[int, ...]
  begin_token: int | None
  chat_template: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TextHeader:
  """The `text` section of config.json."""

  tokenizer: bool = True
  stop_tokens: tuple[int, ...] = ()
  begin_token: int | None = None
  chat_template: str | None = None


def read_header(path: str | os.PathLike[str], *, what: str = "MODEL") -> Header:
  """The architecture and lineage of a MODEL directory, without its arrays.

  Args:
    path: the directory.
    what: the flag or field that named it, for messages.

  Returns:
    The header.

  Raises:
    errors.UserError: where `path` is not a whole MODEL directory.
  """
  directory = epath.Path(path).expanduser()
  if not directory.is_dir():
    near = _nearby_models(directory)
    raise errors.UserError(
      f"{what}={str(path)!r}: there is no such directory"
      + (f"; {errors.nearest(str(path), near)}" if near else "")
    )
  header_file = directory / "config.json"
  if not header_file.exists():
    near = _nearby_models(directory / "model")
    raise errors.UserError(
      f"{what}={str(path)!r} is not a MODEL directory: it has no config.json"
      + (f"; {errors.nearest(str(directory / 'model'), near)}" if near else "")
    )
  try:
    header = json.loads(header_file.read_text())
    model = header["model"]
    lineage = Lineage.from_json(header["lineage"])
    stored_format = header["format"]
  except (ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{header_file} is not a MODEL header: {type(error).__name__}: {error}"
    ) from error
  if stored_format != FORMAT:
    raise errors.UserError(
      f"{header_file}: format {stored_format}, this version reads {FORMAT}"
    )
  # Headers written before a MODEL could be without a tokenizer do not say.
  text = config.build(
    _TextHeader, header.get("text", {}), path=f"{header_file}:text"
  )
  return Header(
    config=config.build(ModelConfig, model, path=f"{header_file}:model"),
    lineage=lineage,
    has_tokenizer=text.tokenizer,
    stop_tokens=text.stop_tokens,
    begin_token=text.begin_token,
    chat_template=text.chat_template,
  )


def load_model(
  path: str | os.PathLike[str],
  *,
  like: Any,
  with_optimizer: bool = True,
  what: str = "MODEL",
) -> StoredModel:
  """Reads a MODEL directory.

  Args:
    path: the directory.
    like: a function from its ModelConfig to the abstract parameters, in
      practice `decoder_lm.abstract_params`.
    with_optimizer: whether to read the optimizer state where there is one.
    what: the flag or field that named it, for messages.

  Returns:
    The stored model.

  Raises:
    errors.UserError: as `read_header`, or where a leaf is missing, left over,
      misshapen or damaged.
  """
  directory = epath.Path(path).expanduser()
  header = read_header(path, what=what)
  shapes = like(header.config)
  wide = _widened(shapes)
  moments = None
  if with_optimizer and (directory / "optimizer").exists():
    moments = _read_moments(directory / "optimizer", wide)
  ema = directory / "ema"
  return dataclasses.replace(
    _without_arrays(directory, header, shapes=shapes),
    params=array_store.read_tree(directory / "params", shapes),
    moments=moments,
    ema=array_store.read_tree(ema, wide) if ema.exists() else None,
  )


def _without_arrays(
  directory: epath.Path, header: Header, *, shapes: Any
) -> StoredModel:
  """A MODEL but for its arrays: shapes of parameters."""
  return StoredModel(
    config=header.config,
    lineage=header.lineage,
    params=shapes,
    tokenizer=read_tokenizer(directory) if header.has_tokenizer else None,
    stop_tokens=header.stop_tokens,
    begin_token=header.begin_token,
    chat_template=header.chat_template,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelReader:
  """A MODEL directory, opened and not read."""

  model: StoredModel  # its `params` as shapes; without moments and average
  params: array_store.TreeReader
  optimizer: array_store.TreeReader | None  # leaves mu.*, nu.* and count
  ema: array_store.TreeReader | None


def open_model(
  path: str | os.PathLike[str], *, like: Any, what: str = "MODEL"
) -> ModelReader:
  """Opens a MODEL directory, to be read slice by slice.

  Args:
    path: the directory.
    like: as for `load_model`.
    what: the flag or field that named it, for messages.

  Returns:
    The readers.

  Raises:
    errors.UserError: as `load_model`, but for damage, which the readers find.
  """
  directory = epath.Path(path).expanduser()
  header = read_header(path, what=what)
  shapes = like(header.config)
  wide = _widened(shapes)

  def optional(name: str, tree: Any) -> array_store.TreeReader | None:
    folder = directory / name
    return array_store.TreeReader(folder, tree) if folder.exists() else None

  return ModelReader(
    model=_without_arrays(directory, header, shapes=shapes),
    params=array_store.TreeReader(directory / "params", shapes),
    optimizer=optional("optimizer", {"mu": wide, "nu": wide, "count": _COUNT}),
    ema=optional("ema", wide),
  )


def read_tokenizer(path: str | os.PathLike[str]) -> str:
  """The text of a MODEL's tokenizer.json.

  Raises:
    errors.UserError: where it is missing.
  """
  file = epath.Path(path).expanduser() / "tokenizer.json"
  if not file.exists():
    raise errors.UserError(f"{file} is missing; this MODEL is not whole")
  return file.read_text()


def _header(model: StoredModel) -> dict[str, Any]:
  return {
    "format": FORMAT,
    "package_version": version.VERSION,
    "model": config.to_dict(model.config),
    "lineage": model.lineage.to_json(),
    "text": {
      "tokenizer": model.tokenizer is not None,
      "stop_tokens": list(model.stop_tokens),
      "begin_token": model.begin_token,
      "chat_template": model.chat_template,
    },
  }


def _moments_tree(moments: AdamMoments) -> dict[str, Any]:
  return {"mu": moments.mu, "nu": moments.nu, "count": moments.count}


def _read_moments(directory: epath.Path, wide: Any) -> AdamMoments:
  tree = array_store.read_tree(
    directory, {"mu": wide, "nu": wide, "count": _COUNT}
  )
  return AdamMoments(count=tree["count"], mu=tree["mu"], nu=tree["nu"])


def _widened(shapes: Any) -> Any:
  """Moments and average are at least float32 whatever the parameters are."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, dtypes.at_least_float32(leaf.dtype)
    ),
    shapes,
  )


def _nearby_models(path: epath.Path) -> list[str]:
  """MODEL directories beside `path`, for a hint."""
  if not path.parent.is_dir():
    return []
  return [
    str(child)
    for child in path.parent.iterdir()
    if (child / "config.json").exists()
  ]
