"""Flags of `evaluate` that concern tasks, and what they make happen."""

from __future__ import annotations

import json
from typing import Any

from absl import flags
from etils import epath

from aquila_jax.core import errors, files
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.evaluation import harness_run
from aquila_jax.pipeline.context import say_on_stderr

TASKS: Any = flags.DEFINE_list(
  "tasks", None, "Instead of data: names or patterns; list shows all names."
)
_INCLUDE_PATH: Any = flags.DEFINE_list(
  "include_path", [], "Of tasks: folders of your own task files."
)
_NUM_FEWSHOT: Any = flags.DEFINE_integer(
  "num_fewshot", None, "Of tasks: examples in front of an item.", lower_bound=0
)
_LIMIT: Any = flags.DEFINE_integer(
  "limit", None, "Of tasks: so many items, the first.", lower_bound=1
)
_DTYPE: Any = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "Of tasks: of the computation; by default what the MODEL says.",
)
_SAMPLES = flags.DEFINE_string(
  "samples", "", "Of tasks: a .jsonl file for all items and answers."
)

OTHERS = (_INCLUDE_PATH, _NUM_FEWSHOT, _LIMIT, _DTYPE, _SAMPLES)


def wants_list() -> bool:
  return TASKS.value == ["list"]


def print_list() -> None:
  """The names that --tasks takes, one a line."""
  print("\n".join(harness_run.task_names(_INCLUDE_PATH.value)))


def check() -> None:
  """Refuses before the work what cannot be done after it.

  Raises:
    errors.UserError: where the harness is missing, or --samples is taken.
  """
  harness_run.quiet_lm_eval()
  path = _SAMPLES.value
  if not path:
    return
  target = epath.Path(path).expanduser()
  if target.exists():
    raise errors.UserError(f"--samples={path!r}: it exists; choose another")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--samples={path!r}: cannot be made: {error.strerror}"
    ) from error


def run(
  model: StoredModel, *, title: str, batch_size: int | None
) -> dict[str, Any]:
  """Runs the tasks, prints their table and writes --samples.

  Args:
    model: to evaluate.
    title: of the table.
    batch_size: rows at a time; None is the default.

  Returns:
    The record for --output.
  """
  request = harness_run.Request(
    tasks=tuple(TASKS.value),
    include_path=tuple(_INCLUDE_PATH.value),
    num_fewshot=_NUM_FEWSHOT.value,
    limit=_LIMIT.value,
    batch_size=batch_size or harness_run.Request.batch_size,
    dtype=_DTYPE.value or "",
  )
  runs = harness_run.run(model, request, say=say_on_stderr)
  print(harness_run.table(runs).plain(title))
  if _SAMPLES.value:
    samples = [sample for one in runs for sample in one.samples]
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in samples]
    files.replace_text(epath.Path(_SAMPLES.value).expanduser(), "".join(lines))
  return harness_run.to_json(request, runs)
