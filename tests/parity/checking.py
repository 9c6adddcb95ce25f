"""What every parity test does: compare, record, and assert."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aquila_jax.core.model_dir import StoredModel, load_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import generate_tokens
from aquila_jax.interop import comparison, export_model, import_model
from aquila_jax.interop.comparison import Comparison, OurModel
from aquila_jax.interop.stock_model import StockModel
from aquila_jax.models import decoder_lm

# Of the issue: the largest difference of two logits, in float32 on CPU.
TOLERANCE = 2e-4
CONTINUE_TOKENS = 64
# Tiny models read bytes. The texts are chosen for lengths of 65 to 128, which
# share their programs.
TEXTS = [text for text in comparison.TEXTS if 64 < len(text.encode()) <= 128]
BYTES = [list(text.encode()) for text in TEXTS]


def greedy(ours: OurModel, tokens: Sequence[int], count: int) -> Sequence[int]:
  """By our cache; no token stops it."""
  (row,) = generate_tokens(
    ours.config,
    ours.params,
    [tokens],
    sampling=Sampling(max_new_tokens=count, temperature=0, stop_tokens=()),
  )
  return row.tokens


def compare(
  stored: StoredModel,
  reference: StockModel,
  rows: Sequence[Sequence[int]] = BYTES,
  *,
  continue_tokens: int = CONTINUE_TOKENS,
) -> Comparison:
  """At the tolerance of the issue."""
  config, params = comparison.in_float32(stored)
  return comparison.compare(
    OurModel(config=config, params=params, continuation=greedy),
    rows,
    reference=reference,
    tolerance=TOLERANCE,
    continue_tokens=continue_tokens,
  )


def record(
  path: pathlib.Path | None,
  found: Comparison,
  *,
  section: str,
  options: str,
  reference: StockModel,
) -> None:
  """Appends a row of the tables in docs/parity.md."""
  if path is None:
    return
  texts = found.texts
  row = {
    "section": section,
    "model": reference.architecture,
    "options": options,
    "texts": len(texts),
    "tokens": sum(text.num_tokens for text in texts),
    "largest_difference": found.largest_difference,
    "decided": sum(text.decided for text in texts),
    "same_best": sum(text.same_best for text in texts),
    # Tokens of the continuations, up to where nothing is decided and they part.
    "continued": sum(text.continuation.asked for text in texts),
    "continued_same": sum(text.continuation.same for text in texts),
    "ties": sum(text.continuation.gap is not None for text in texts),
    "versions": reference.versions | {"jax": jax.__version__},
  }
  with path.open("a", encoding="utf-8") as file:
    file.write(json.dumps(row) + "\n")


def load(path: pathlib.Path) -> StoredModel:
  return load_model(path, like=decoder_lm.abstract_params)


def imported(source: pathlib.Path, output: pathlib.Path) -> StoredModel:
  """The MODEL of a checkpoint of another format."""
  checkpoint = import_model.open_checkpoint(source)
  assert checkpoint.unknown == []
  import_model.import_model(
    checkpoint, output, parent=source.name, progress=_ignore
  )
  return load(output)


def exported(
  source: pathlib.Path, output: pathlib.Path, **options: Any
) -> export_model.Exported:
  return export_model.export_model(source, output, progress=_ignore, **options)


def assert_same_model(found: StoredModel, expected: StoredModel) -> None:
  """Configuration, types and every bit."""
  assert found.config == expected.config

  def same(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)

  jax.tree.map(same, found.params, expected.params)


def _ignore(line: str) -> None:
  del line
