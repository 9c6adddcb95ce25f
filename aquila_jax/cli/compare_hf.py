"""Whether stock transformers computes the same as a MODEL, in float32 on CPU.

  python -m aquila_jax.cli.compare_hf --model=MODEL --reference=PATH [--trace]

PATH is a Hugging Face directory or a .gguf file: what the MODEL was imported
from, or exported to. Exit code 1 where they disagree. Needs the extra `parity`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from aquila_jax.cli import app, model_flags
from aquila_jax.core import errors
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.evaluation.tables import Table
from aquila_jax.generation.generate import text_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import generate_tokens
from aquila_jax.interop import comparison, tracing
from aquila_jax.interop.comparison import Comparison, OurModel, TextComparison
from aquila_jax.interop.stock_model import StockModel
from aquila_jax.interop.tracing import PartDifference
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.training.compilation import enable_compilation_cache

_MODEL = flags.DEFINE_string("model", None, "A MODEL.", required=True)
_REFERENCE = flags.DEFINE_string(
  "reference", None, "A Hugging Face directory or .gguf file.", required=True
)
_TEXT = flags.DEFINE_multi_string(
  "text", [], "A text to compare on; may be given several times."
)
_TEXT_FILE = flags.DEFINE_string("text_file", "", "Texts, one a line.")
_TRACE = flags.DEFINE_bool(
  "trace", False, "Says in which part the two first part."
)
_TOLERANCE = flags.DEFINE_float(
  "tolerance", 2e-4, "Of a logit.", lower_bound=0.0
)
_CONTINUE_TOKENS = flags.DEFINE_integer(
  "continue_tokens", 64, "Of every text's continuation.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file for the result.")


def main() -> None:
  if _OUTPUT.value:
    model_flags.check_output(_OUTPUT.value)
  texts = _texts()
  stored = model_flags.load(_MODEL.value, flag="model", with_optimizer=False)
  rows = _encode(texts, stored)
  reference = StockModel(_REFERENCE.value, what="--reference")
  config, params = comparison.in_float32(stored)
  comparison.check_same_shape(config, reference)
  enable_compilation_cache()
  ours = OurModel(config=config, params=params, continuation=_greedy)
  result = comparison.compare(
    ours,
    rows,
    reference=reference,
    tolerance=_TOLERANCE.value,
    continue_tokens=_CONTINUE_TOKENS.value,
  )
  record = {
    "model": _MODEL.value,
    "reference": _REFERENCE.value,
    "architecture": reference.architecture,
    "versions": reference.versions,
  } | result.to_json()
  title = f"{_MODEL.value} and {reference.architecture} of {_REFERENCE.value}"
  print(comparison_table(result, texts).plain(title))
  if _TRACE.value:
    record["trace"] = _trace(ours, rows[_worst(result)], reference)
  if _OUTPUT.value:
    model_flags.write_json(_OUTPUT.value, record)
  for failure in result.failures:
    print(failure)
  print(verdict(result))
  if result.failures:
    sys.exit(1)


def comparison_table(result: Comparison, texts: Sequence[str]) -> Table:
  """A row a text.

  Args:
    result: of the comparison.
    texts: that were compared.

  Returns:
    The table; what is not decided does not count against anybody.
  """
  return Table(
    columns=(
      "text",
      "tokens",
      "largest difference",
      "same best token",
      "same continuation",
    ),
    rows=[
      (
        repr(text if len(text) <= 40 else text[:37] + "..."),
        f"{row.num_tokens:,}",
        f"{row.largest_difference:.1e}",
        f"{row.same_best} of {row.decided}",
        _continued(row),
      )
      for text, row in zip(texts, result.texts, strict=True)
    ],
    words=("same continuation",),
  )


def verdict(result: Comparison) -> str:
  """The last line: what was found, and whether it is agreement."""
  what = "they disagree" if result.failures else "they agree"
  return (
    f"{what}: logits differ by at most {result.largest_difference:.1e}, the"
    f" limit is {result.tolerance:.1e}"
  )


def trace_table(parts: Sequence[PartDifference]) -> Table:
  """A row a part of the model, in the order of computing."""
  return Table(
    columns=("part", "difference", "of it the part's own", "limit", ""),
    rows=[
      (
        str(part.place),
        f"{part.total:.1e}",
        f"{part.own:.1e}",
        f"{part.limit:.1e}",
        "parts" if part.parted else "",
      )
      for part in parts
    ],
    words=("",),
  )


def _continued(row: TextComparison) -> str:
  continuation = row.continuation
  if continuation.gap is None:
    return f"{continuation.same} of {continuation.asked}"
  return f"{continuation.same}, then {continuation.gap:.1e} apart"


def _trace(
  ours: OurModel, tokens: Sequence[int], reference: StockModel
) -> dict[str, Any]:
  """Prints where the two part on one text."""
  parts = tracing.compare_traces(
    ours.config, ours.params, tokens, reference=reference.trace(tokens)
  )
  print(trace_table(parts).plain("relative differences, part by part"))
  first = tracing.first_parted(parts)
  print(
    "no part differs by more than rounding"
    if first is None
    else f"they part in: {first}"
  )
  return {
    "first_parted": None if first is None else str(first),
    "parts": [
      {"part": str(part.place), "difference": part.total, "own": part.own}
      for part in parts
    ],
  }


def _worst(result: Comparison) -> int:
  """The text with the largest difference; NaN counts as the largest."""
  return int(np.argmax([text.largest_difference for text in result.texts]))


def _texts() -> list[str]:
  """Of --text and --text_file, or the standing ones."""
  texts = list(_TEXT.value)
  if _TEXT_FILE.value:
    try:
      content = epath.Path(_TEXT_FILE.value).expanduser().read_text("utf-8")
    except (OSError, UnicodeError) as error:
      reason = getattr(error, "strerror", None) or str(error)
      raise errors.UserError(
        f"--text_file={_TEXT_FILE.value!r}: cannot be read: {reason}"
      ) from error
    lines = [line for line in content.splitlines() if line.strip()]
    if not lines:
      raise errors.UserError(
        f"--text_file={_TEXT_FILE.value!r}: there is no text in it"
      )
    texts += lines
  return texts or list(comparison.TEXTS)


def _encode(texts: Sequence[str], stored: StoredModel) -> list[list[int]]:
  """The tokens of every text, cut to leave room for its continuation."""
  context, count = stored.config.context_length, _CONTINUE_TOKENS.value
  if count >= context:
    raise errors.UserError(
      f"--continue_tokens={count}: expected fewer than the MODEL's"
      f" context_length={context}"
    )
  rows = [row[: context - count] for row in _all_tokens(texts, stored)]
  for text, row in zip(texts, rows, strict=True):
    if not row:
      raise errors.UserError(
        f"--text={text!r}: has no tokens; give at least one character"
      )
  return rows


def _all_tokens(texts: Sequence[str], stored: StoredModel) -> list[list[int]]:
  """By the MODEL's tokenizer, or, where it has none, of the texts' bytes."""
  if stored.tokenizer is None:
    say_on_stderr(
      "the MODEL has no tokenizer.json: bytes of the texts stand for tokens"
    )
    rows = stored.config.vocab_size
    return [[byte % rows for byte in text.encode()] for text in texts]
  tokenizer = text_model(stored).tokenizer
  return [tokenizer.encode(text).ids for text in texts]


def _greedy(ours: OurModel, tokens: Sequence[int], count: int) -> Sequence[int]:
  """By our own cache; no token stops it."""
  (row,) = generate_tokens(
    ours.config,
    ours.params,
    [tokens],
    sampling=Sampling(max_new_tokens=count, temperature=0, stop_tokens=()),
  )
  return row.tokens


if __name__ == "__main__":
  app.run(main)
