"""Runs of tasks; what needs lm_eval is skipped where it is missing."""

from __future__ import annotations

import importlib.util
import json
import logging

import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.evaluation import harness_run
from aquila_jax.evaluation.harness_run import Metric, Request, TaskRun
from tests.evaluation import tiny_lm

needs_lm_eval = pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)

ANSWER = {
  "results": {
    "mine": {
      "name": "mine",
      "alias": "mine",
      "sample_len": 1500,
      "acc,none": 0.25,
      "acc_stderr,none": 0.0125,
      "exact_match,strict": 1.0,
      "exact_match_stderr,strict": "N/A",
    },
  },
  "configs": {"mine": {"task": "mine"}},
  "versions": {"mine": 1.0},
  "git_hash": "abc",
  "samples": {"mine": [{"doc_id": 0, "acc": 1.0}]},
}


def test_answers_become_metrics_records_and_samples():
  run = harness_run._task_run("mine", ANSWER, seconds=2.0)
  assert run.metrics == (
    Metric(task="mine", name="acc", value=0.25, stderr=0.0125, items=1500),
    Metric(
      task="mine",
      name="exact_match (strict)",
      value=1.0,
      stderr=None,
      items=1500,
    ),
  )
  assert set(run.record) == {"results", "configs", "versions"}
  assert run.samples == [{"task": "mine", "doc_id": 0, "acc": 1.0}]


def test_a_group_comes_before_its_tasks_and_once():
  answer = {
    "results": {
      "all": {"sample_len": 3, "acc,none": 0.5},
      "a": {"sample_len": 1, "acc,none": 0.0},
    },
    "groups": {"all": {"sample_len": 3, "acc,none": 0.5}},
  }
  run = harness_run._task_run("all", answer, seconds=1.0)
  assert [metric.task for metric in run.metrics] == ["all", "a"]


def test_the_table_has_a_row_a_number():
  runs = [
    harness_run._task_run("mine", ANSWER, seconds=1234.56),
    TaskRun(name="x", metrics=(), seconds=1.0, record={}, samples=[]),
  ]
  assert harness_run.table(runs).rows == [
    ("mine", "acc", "0.2500", "0.0125", "1,500", "1,234.6"),
    ("", "exact_match (strict)", "1.0000", "", "1,500", ""),
  ]


def test_one_warning_of_the_harness_is_about_nothing():
  def shown(text: str) -> bool:
    record = logging.LogRecord("lm_eval", 30, "", 0, text, None, None)
    return harness_run._is_for_people(record)

  assert not shown("mine: Custom kwargs can be passed to `--metadata` ...")
  assert shown("Truncating 3 tokens from the left.")


MULTIPLE_CHOICE = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/data.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: mine_rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: FOLDER/data.jsonl
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
ITEMS = [
  {"question": "a stone is", "choices": ["why", "rivers", "x"], "gold": 1},
  {"question": "rivers run", "choices": ["a stone", "石头"], "gold": 0},
  {"question": "why", "choices": ["x", "a"], "gold": 0},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Of task files and their data, which the harness reads from disk."""
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  path = tmp_path / "tasks"
  path.mkdir()
  for name, text in (("mine", MULTIPLE_CHOICE), ("rolling", ROLLING)):
    file = path / f"{name}.yaml"
    file.write_text(text.replace("FOLDER", str(path)), encoding="utf-8")
  lines = [json.dumps(item, ensure_ascii=False) for item in ITEMS]
  (path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
  return path


def encode(text: str) -> list[int]:
  return tiny_lm.tokenizer().encode(text).ids


@needs_lm_eval
def test_a_users_tasks_give_what_the_rows_alone_give(folder):
  right, nats, size = [], 0.0, 0
  for item in ITEMS:
    context = encode(item["question"])
    scores = [
      tiny_lm.log_prob(
        context, encode(f"{item['question']} {choice}")[len(context) :]
      )
      for choice in item["choices"]
    ]
    right.append(float(np.argmax(scores) == item["gold"]))
    nats += tiny_lm.log_prob([0], context)
    size += len(item["question"].encode())
  request = Request(
    tasks=("mine", "mine_r*"), include_path=(str(folder),), batch_size=4
  )
  said = []
  runs = harness_run.run(tiny_lm.stored(), request, say=said.append)
  assert [run.name for run in runs] == ["mine", "mine_rolling"]
  (accuracy,), (bits,) = (run.metrics for run in runs)
  assert (accuracy.name, accuracy.items) == ("acc", 3)
  assert accuracy.value == pytest.approx(np.mean(right))
  assert bits.value == pytest.approx(-nats / size / np.log(2), rel=3e-6)
  assert [sample["acc"] for sample in runs[0].samples] == right
  assert said[0] == "mine: reading the task"
  record = json.loads(json.dumps(harness_run.to_json(request, runs)))
  assert record["options"]["tasks"] == ["mine", "mine_r*"]
  assert record["tasks"]["mine"]["metrics"][0]["value"] == accuracy.value
  assert "lm_eval" in record["software"]


@needs_lm_eval
def test_limit_and_examples_reach_the_harness(folder):
  request = Request(
    tasks=("mine",), include_path=(str(folder),), limit=2, num_fewshot=1
  )
  (run,) = harness_run.run(tiny_lm.stored(), request, say=lambda line: None)
  assert run.metrics[0].items == len(run.samples) == 2
  assert run.record["n-shot"] == {"mine": 1}
  questions = run.samples[0]["arguments"][0][0].split("\n\n")
  assert len(questions) == 2 and questions[1] == ITEMS[0]["question"]


@needs_lm_eval
def test_mistakes_are_refused(folder):
  def refused(**fields) -> str:
    with pytest.raises(errors.UserError) as raised:
      harness_run.run(
        tiny_lm.stored(), Request(**fields), say=lambda line: None
      )
    return str(raised.value)

  path = (str(folder),)
  (folder / "data.jsonl").unlink()
  message = refused(tasks=("mine",), include_path=path)
  assert message.startswith(
    "--tasks='mine': cannot be loaded: FileNotFoundError: "
  )
  assert "\n" not in message
  assert refused(tasks=("mine",), include_path=("gone",)) == (
    "--include_path='gone': there is no such directory"
  )
