"""A MODEL as a directory that stock transformers, vLLM and llama.cpp read.

python -m aquila_jax.cli.export_hf --source=MODEL --output=DIR
"""

from __future__ import annotations

import re
from typing import Any

from absl import flags
from tokenizers import Tokenizer

from aquila_jax.cli import app, model_flags
from aquila_jax.core import errors, model_dir
from aquila_jax.generation.generate import end_of_text
from aquila_jax.interop.export_model import export_model
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.planning.counting import in_words

_SOURCE = flags.DEFINE_string("source", None, "A MODEL.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A directory.", required=True)
_DTYPE: Any = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of the tensors; the model's own by default.",
)
_MAX_SHARD_SIZE = flags.DEFINE_string(
  "max_shard_size", "2GB", "Of a file of tensors, as in 500MB or 5GB."
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", re.IGNORECASE)


def main() -> None:
  size = parse_size(_MAX_SHARD_SIZE.value)
  model_flags.check_output(_OUTPUT.value)
  exported = export_model(
    _SOURCE.value,
    _OUTPUT.value,
    dtype=_DTYPE.value,
    max_shard_bytes=size,
    end_of_text=_end_of_text(_SOURCE.value),
    what="--source",
    progress=say_on_stderr,
  )
  print(
    f"{_OUTPUT.value}: {exported.architecture}, {exported.num_tensors} tensors,"
    f" {in_words(exported.num_bytes)} bytes in {exported.num_shards} file"
    + ("s" if exported.num_shards > 1 else "")
  )


def parse_size(text: str) -> int:
  """Bytes of "500MB"; decimal units, as in transformers.

  Raises:
    errors.UserError: where it is no size above 0.
  """
  found = _SIZE.fullmatch(text.strip())
  size = 0
  if found:
    unit = (found[2] or "").upper()
    size = int(float(found[1]) * _UNITS["" if unit == "B" else unit])
  if size < 1:
    raise errors.UserError(
      f"--max_shard_size={text!r}: expected a size, as in 500MB or 5GB"
    )
  return size


def _end_of_text(path: str) -> str | None:
  """The token that ends a text, by the MODEL's tokenizer."""
  if not model_dir.read_header(path, what="--source").has_tokenizer:
    return None
  tokenizer = Tokenizer.from_str(model_dir.read_tokenizer(path))
  token_id = end_of_text(tokenizer)
  return None if token_id is None else tokenizer.id_to_token(token_id)


if __name__ == "__main__":
  app.run(main)
