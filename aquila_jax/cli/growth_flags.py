"""What the verbs that grow a MODEL share: --target, --check, --output."""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from absl import flags, logging
from etils import epath

from aquila_jax.cli import model_flags
from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import ModelReader
from aquila_jax.growth.exactness import Check, Exactness
from aquila_jax.interop.comparison import TEXTS


@dataclasses.dataclass(frozen=True)
class CheckFlags:
  """--check and what it reads."""

  check: flags.FlagHolder
  file: flags.FlagHolder
  count: flags.FlagHolder

  @property
  def wanted(self) -> bool:
    return self.check.value

  def refuse_file_alone(self) -> None:
    """Refuses --check_file without --check.

    Raises:
      errors.UserError: saying so.
    """
    if self.file.value and not self.check.value:
      raise errors.UserError("--check_file is read by --check only; give both")

  def tokens(self, source: ModelReader) -> np.ndarray:
    """One row of the text of --check, [1 T].

    Args:
      source: whose tokenizer reads it, and whose context it must fit in.

    Returns:
      The ids.

    Raises:
      errors.UserError: where the file cannot be read, or is too short.
    """
    text = read_text(self.file.value, flag="check_file")
    row = encode(text, source)
    row = row[: min(self.count.value, source.model.config.context_length)]
    if len(row) < 2:
      raise errors.UserError(
        f"--check_file={self.file.value!r}: it has {len(row)} tokens; expected"
        " at least 2"
      )
    return np.asarray([row], np.int64)


def define_check() -> CheckFlags:
  """Defines --check, --check_file and --check_tokens."""
  return CheckFlags(
    flags.DEFINE_bool(
      "check", False, "Run source and target on a text before writing."
    ),
    flags.DEFINE_string(
      "check_file", "", "The text of --check, in place of a standing one."
    ),
    flags.DEFINE_integer(
      "check_tokens", 256, "How much of it is read.", lower_bound=2
    ),
  )


def define_dry_run() -> flags.FlagHolder:
  """Defines --dry_run."""
  return flags.DEFINE_bool("dry_run", False, "Do all but write.")


def read_text(path: str, *, flag: str) -> str:
  """The text of a file, or a standing one where none is named.

  Raises:
    errors.UserError: where it cannot be read, naming the flag.
  """
  if not path:
    return "\n".join(TEXTS)
  try:
    return epath.Path(path).expanduser().read_text("utf-8")
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"--{flag}={path!r}: cannot be read: {error}"
    ) from error


def encode(text: str, source: ModelReader) -> list[int]:
  """The tokens of a text; of a MODEL without a tokenizer its bytes."""
  vocab_size = source.model.config.vocab_size
  if source.model.tokenizer is None:
    return [byte % vocab_size for byte in text.encode()]
  tokenizer = tokenizers.Tokenizer.from_str(source.model.tokenizer)
  return [i for i in tokenizer.encode(text).ids if i < vocab_size]


def say_checked(exactness: Exactness, check: Check) -> None:
  """Prints what was measured, and where it is not what was predicted.

  Raises:
    errors.UserError: where logits are not finite.
  """
  print(check.in_words(), flush=True)
  share = check.largest_difference / check.largest_logit
  if not math.isfinite(share):
    raise errors.UserError(
      "--check: the logits are not finite; nothing was written"
    )
  if exactness.exact and share > 0.01:
    logging.warning(
      "predicted exact, and logits differ by %.1f %% of the largest: %s",
      100 * share,
      "; ".join(exactness.notes) or "this is a fault, please report it",
    )


def check_output(output: str | None, source: str) -> None:
  """Refuses an output that is missing, taken or inside of the source.

  Raises:
    errors.UserError: naming the flag.
  """
  if output is None:
    raise errors.UserError("--output is missing; --dry_run needs none")
  model_flags.check_output(output)
  inside, outside = (
    os.path.realpath(os.path.expanduser(path)) for path in (output, source)
  )
  if inside.startswith(outside + os.sep):
    raise errors.UserError(
      f"--output={output!r}: it lies in the MODEL of --source; choose another"
    )


def changed(
  fields: Mapping[str, Any], changes: Sequence[str]
) -> tuple[ModelConfig, set[str]]:
  """An architecture with the fields that --target names.

  Args:
    fields: of a ModelConfig, as `config.to_dict` gives them.
    changes: "field=value"; a field of a section as moe.top_k.

  Returns:
    The architecture, and the fields that were named.

  Raises:
    errors.UserError: naming the change.
  """
  fields = dict(fields)
  named = set[str]()
  for part in changes:
    name, equals, text = part.partition("=")
    if not equals:
      raise errors.UserError(f"--target: {part!r} is not a field=value")
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = text  # a word
    *sections, last = name.strip().split(".")
    node = fields
    for section in sections:
      below = node.get(section)
      if not isinstance(below, dict | types.NoneType):
        raise errors.UserError(f"--target: {part!r}: {section} has no fields")
      node[section] = dict(below or {})
      node = node[section]
    if name.strip() in named:
      raise errors.UserError(f"--target: {name.strip()} is given twice")
    node[last] = value
    named.add(name.strip())
  return config_lib.build(ModelConfig, fields, path="--target"), named
