"""A step of a stage replayed, as files and as a page of text.

WORKDIR/replay/step_N/
  report.json      losses, norms, every row and every leaf
  batch.npz        the batch, and what each target costs
  rows.txt         the text of every row, the dearest first
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from aquila_jax.core import errors, files
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.pipeline import budget, records
from aquila_jax.pipeline.initial import Start
from aquila_jax.pipeline.stage import check_unchanged, job_of
from aquila_jax.training.metrics import strict
from aquila_jax.training.replay import Replay, replay

_SHOWN = 8  # rows and leaves of the page
_EXCERPT = 60  # characters around the dearest target


def check_step(experiment: ExperimentConfig, stage: str, step: int) -> None:
  """Refuses a step that a stage does not have, before anything is read.

  Raises:
    errors.UserError: saying which it has.
  """
  total = budget.total_steps(experiment, stage)
  if not 1 <= step <= total:
    raise errors.UserError(
      f"--replay_step={step}: expected a step of 1 to {total}"
    )


def replay_step(start: Start, directory: epath.Path, step: int) -> str:
  """Takes a step of a stage again, and writes what it is.

  Args:
    start: of the stage.
    directory: of the stage, which has been trained to the step or beyond.
    step: which, from 1.

  Returns:
    The page.

  Raises:
    errors.UserError: where the stage has not begun, or has no such step.
  """
  check_unchanged(start, directory)
  if records.read(directory / "stage.json") is None:
    raise errors.UserError(
      f"--replay_step={step}: {directory} has no training yet"
    )
  job = job_of(start, directory)
  found = replay(
    job, step, say=lambda line: start.context.say(f"{start.name}: {line}")
  )
  tokenizer = tokenizers.Tokenizer.from_str(start.context.data.tokenizer_text)
  rows = _rows(found, tokenizer, languages=job.input.languages)
  folder = directory / "replay" / f"step_{step}"
  folder.mkdir(parents=True, exist_ok=True)
  _write(folder, found, rows)
  return _page(found, rows, folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  """A row of the batch."""

  row: int
  language: str
  loss: float  # nats a target
  largest: float  # of one target
  position: int  # of that one
  around: str  # the text around it
  text: str


def _rows(
  found: Replay, tokenizer: tokenizers.Tokenizer, *, languages: Any
) -> list[_Row]:
  """The dearest first."""
  rows = []
  batch = found.batch
  for number, nats in enumerate(found.nats):
    counted = batch.weights[number] > 0
    tokens = batch.tokens[number][batch.segments[number] > 0].tolist()
    # What is not finite is the dearest of all.
    dear = np.where(counted, np.nan_to_num(nats, nan=np.inf), -np.inf)
    position = int(np.argmax(dear))
    rows.append(
      _Row(
        row=number,
        language=languages[int(batch.languages[number, 0])],
        loss=float(nats[counted].mean()) if counted.any() else 0.0,
        largest=float(nats[position]),
        position=position,
        around=_around(tokenizer, tokens, position),
        text=tokenizer.decode(tokens, skip_special_tokens=False),
      )
    )
  rows.sort(key=lambda row: -np.nan_to_num(row.loss, nan=np.inf))
  return rows


def _around(
  tokenizer: tokenizers.Tokenizer, tokens: list[int], position: int
) -> str:
  """As in `...the river [flowed]...`: the target of a position in brackets."""

  def text(ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)

  before = text(tokens[: position + 1])[-_EXCERPT:]
  target = text(tokens[position + 1 : position + 2])
  after = text(tokens[position + 2 :])[:_EXCERPT]
  return " ".join(f"{before}[{target}]{after}".split())


def _write(folder: epath.Path, found: Replay, rows: list[_Row]) -> None:
  report = {
    field.name: getattr(found, field.name)
    for field in dataclasses.fields(found)
    if field.name not in ("batch", "nats", "leaves")
  }
  report["rows"] = [
    {k: v for k, v in dataclasses.asdict(row).items() if k != "text"}
    for row in rows
  ]
  report["leaves"] = [dataclasses.asdict(leaf) for leaf in found.leaves]
  records.write(folder / "report.json", strict(report))
  buffer = io.BytesIO()
  np.savez_compressed(buffer, nats=found.nats, **vars(found.batch))
  files.replace_bytes(folder / "batch.npz", buffer.getvalue())
  files.replace_text(
    folder / "rows.txt",
    "".join(
      f"=== row {row.row}, {row.language}, loss {row.loss:.4f}\n{row.text}\n"
      for row in rows
    ),
  )


def _page(found: Replay, rows: list[_Row], folder: epath.Path) -> str:
  before = ", ".join(f"{loss:.4f}" for loss in found.losses[-6:-1])
  lines = [
    f"step {found.step}: loss {found.loss:.4f}"
    + (f" (before it {before})" if before else "")
    + f", gradient norm {found.gradient_norm:.4g}"
    + ("" if found.is_finite else ", NOT FINITE"),
    "",
    f"rows, the dearest {min(_SHOWN, len(rows))} of {len(rows)}",
    *(
      f"  {row.row:5d}  {row.language}  loss {row.loss:8.4f}  up to"
      f" {row.largest:8.4f} at {row.position}: {row.around}"
      for row in rows[:_SHOWN]
    ),
    "",
    f"gradient by leaf, the largest {min(_SHOWN, len(found.leaves))} of"
    f" {len(found.leaves)}",
    *(
      f"  {leaf.norm:10.4g}  of a parameter of norm {leaf.parameter_norm:10.4g}"
      f"  {leaf.name}"
      + (f"  {leaf.num_bad} not finite" if leaf.num_bad else "")
      for leaf in found.leaves[:_SHOWN]
    ),
    "",
    f"all of it: {folder}",
  ]
  return "\n".join(lines)
