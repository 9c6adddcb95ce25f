from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil

import pytest

from aquila_jax.core.experiment_config import SourceConfig
from aquila_jax.data import raw_text
from aquila_jax.data.prepared import PreparedData
from aquila_jax.data.tokenizer import Tokenizer
from aquila_jax.evaluation.perplexity import evaluate
from aquila_jax.evaluation.scores import Scores
from aquila_jax.evaluation.tables import scores_table
from tests.cli import tiny
from tests.cli.commands import ROOT, names, succeeded

TEXT = "experiments/data/smoke/en.txt"


def _assert_same(found: Scores, expected: Scores) -> None:
  assert found.split == expected.split
  assert list(found.languages) == list(expected.languages)
  for name, score in expected.languages.items():
    got = found.languages[name]
    assert (got.tokens, got.bytes) == (score.tokens, score.bytes)
    # Losses in float32, some ten roundings of 6e-8 each.
    assert got.nats == pytest.approx(score.nats, rel=1e-6)


def _prepared(model, data) -> Scores:
  return evaluate(
    model.config,
    model.params,
    data=PreparedData.open(data),
    split="validation",
    sequence_length=model.config.context_length,
    batch_size=4,
    max_tokens=200,
  )


def _text(model) -> Scores:
  text = raw_text.tokenize(
    SourceConfig(path=str(ROOT / TEXT), language="en"),
    tokenizer=Tokenizer.from_text(model.tokenizer),
    field="text",
    progress=lambda line: None,
  )
  return evaluate(
    model.config,
    model.params,
    data=text,
    split="test",
    sequence_length=32,
  )


def test_it_measures_what_the_library_measures(commands, dense, data, tmp_path):
  files = [tmp_path / "prepared.json", tmp_path / "new" / "text.json"]
  found = commands.run_all(
    [
      (
        "evaluate",
        f"--model={dense}",
        f"--data={data}",
        f"--output={files[0]}",
        "--split=validation",
        "--batch_size=4",
        "--max_tokens=200",
      ),
      (
        "evaluate",
        f"--model={dense}",
        f"--data={TEXT}",
        f"--output={files[1]}",
        "--language=en",
        "--sequence_length=32",
      ),
    ]
  )
  model = tiny.load(dense)
  expected = [_prepared(model, data), _text(model)]
  for file, one, scores, name in zip(
    files, found, expected, (str(data), TEXT), strict=True
  ):
    succeeded(one)
    record = json.loads(file.read_text(encoding="utf-8"))
    assert (record["model"], record["data"]) == (str(dense), name)
    stored = Scores.from_json(record)
    _assert_same(stored, scores)
    # Everything else is derived from these, and the table shows them.
    derived = {"model": str(dense), "data": name} | stored.to_json()
    assert record == derived
    title = f"{dense} on {name}"
    assert one.out == scores_table(stored).plain(title) + "\n"
    assert names(file.parent)[-1] == file.name
  assert names(tmp_path) == ["new", "prepared.json"]
  assert list(expected[0].languages) == ["en", "zh"]


@pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is there"
)
def test_tasks_without_the_harness_say_what_to_install(commands, dense):
  missing = "tasks need the package lm_eval; install it: pip install -e .[eval]"
  tasks = "--tasks=hellaswag_100"
  commands.assert_refused(
    {
      "tasks": (("evaluate", f"--model={dense}", tasks), missing),
      "their names": (("evaluate", "--tasks=list"), missing),
      "the harness itself": (("harness", "--model=aquila", tasks), missing),
    }
  )


@pytest.mark.skipif(
  importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)
def test_tasks_give_a_table_a_record_and_samples(commands, dense, tmp_path):
  folder = tmp_path / "tasks"
  folder.mkdir()
  (folder / "data.jsonl").write_text(
    "\n".join(json.dumps({"q": q, "a": ["x", "yes"]}) for q in "abc")
  )
  (folder / "mine.yaml").write_text(
    f"""
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/data.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: a
doc_to_target: 0
"""
  )
  samples, output = tmp_path / "samples.jsonl", tmp_path / "new" / "out.json"
  common = (f"--model={dense}", f"--include_path={folder}")
  found = succeeded(
    commands.run(
      "evaluate",
      *common,
      "--tasks=mine",
      "--limit=2",
      f"--output={output}",
      f"--samples={samples}",
    )
  )
  record = json.loads(output.read_text(encoding="utf-8"))
  assert record["model"] == str(dense)
  (metric, *_) = record["tasks"]["mine"]["metrics"]
  assert (metric["name"], metric["items"]) == ("acc", 2)
  assert f"{metric['value']:.4f}" in found.out
  lines = samples.read_text(encoding="utf-8").splitlines()
  assert [json.loads(line)["doc"]["q"] for line in lines] == ["a", "b"]
  commands.assert_refused(
    {
      "samples that exist": (
        ("evaluate", *common, "--tasks=mine", f"--samples={samples}"),
        f"--samples={str(samples)!r}: it exists; choose another",
      )
    }
  )


def test_mistakes_are_refused(commands, dense, data, tmp_path):
  damaged, other = tmp_path / "damaged", tmp_path / "other"
  tiny.damaged_copy(dense, damaged)
  smaller = Tokenizer.train(
    [(ROOT / TEXT).read_text(encoding="utf-8")],
    vocab_size=300,
    end_of_text="<|endoftext|>",
    field="vocab_size",
  )
  tiny.save(
    other, dataclasses.replace(tiny.load(dense), tokenizer=smaller.to_text())
  )
  shutil.copytree(data, tmp_path / "cut")
  (tmp_path / "cut" / "tokenizer.json").unlink()
  (tmp_path / "empty.txt").write_text(" \n")
  wrong = dense.parent / "dens"
  output = f"--output={tmp_path / 'scores.json'}"
  model, text = (f"--model={dense}", f"--data={TEXT}")
  gone = "experiments/data/smoke/e.txt"
  commands.assert_refused(
    {
      "a wrong path": (
        ("evaluate", f"--model={wrong}", text, output),
        f"--model={str(wrong)!r}: there is no such directory; did you mean"
        f" {str(dense)!r}?",
      ),
      "no MODEL": (
        ("evaluate", f"--model={data}", text, output),
        f"--model={str(data)!r} is not a MODEL directory: it has no"
        " config.json",
      ),
      "data of another tokenizer": (
        ("evaluate", f"--model={other}", f"--data={data}", output),
        f"--data={str(data)!r}: it was prepared with another tokenizer than the"
        " model's; give the text itself, or data prepared with"
        f" config.data.tokenizer.path='{other}/tokenizer.json'",
      ),
      "data without their tokenizer": (
        ("evaluate", model, f"--data={tmp_path / 'cut'}", output),
        f"{tmp_path / 'cut'}/tokenizer.json is missing; prepare the data again",
      ),
      "text that is missing": (
        ("evaluate", model, f"--data={gone}", output),
        f"--data={gone!r}: there is no such file or folder; did you mean"
        f" {TEXT!r}?",
      ),
      "an output that exists": (
        ("evaluate", model, text, f"--output={tmp_path / 'empty.txt'}"),
        f"--output={str(tmp_path / 'empty.txt')!r}: it exists; choose another",
      ),
      "a split of text": (
        ("evaluate", model, text, output, "--split=validation"),
        "--split=validation: is of prepared data; --data is text",
      ),
      "a language of prepared data": (
        ("evaluate", model, f"--data={data}", output, "--language=fr"),
        "--language=fr: is of text; --data is prepared data",
      ),
      "no model": (
        ("evaluate", text, output),
        "--model must be given; --help lists the flags",
      ),
      "neither data nor tasks": (
        ("evaluate", model, output),
        "give --data or --tasks, and not both",
      ),
      "data and tasks": (
        ("evaluate", model, text, "--tasks=hellaswag_100"),
        "give --data or --tasks, and not both",
      ),
      "an option of tasks": (
        ("evaluate", model, text, "--limit=3"),
        "--limit=3: is of --tasks; this evaluates --data",
      ),
      "an option of data": (
        ("evaluate", model, "--tasks=hellaswag_100", "--max_tokens=3"),
        "--max_tokens=3: is of --data; this evaluates --tasks",
      ),
      "longer rows than the context": (
        ("evaluate", model, text, output, "--sequence_length=65"),
        "--sequence_length=65: expected at most the model's context_length=64",
      ),
    }
  )
  empty = str(tmp_path / "empty.txt")
  nothing = commands.run("evaluate", model, f"--data={empty}", output)
  assert (nothing.code, nothing.out) == (2, "")
  assert nothing.err == (
    f"warning: 1 pieces of bad input left out, the first {empty}: is empty\n"
    f"aquila_jax: --data={empty!r}: there is no text in it\n"
  )
  broken = commands.run("evaluate", f"--model={damaged}", text, output)
  assert (broken.code, broken.out) == (2, "")
  assert broken.err.startswith(
    f"aquila_jax: {damaged}/params: leaf 'embedding.table' is damaged: "
  )
  assert broken.err.count("\n") == 1
  assert names(tmp_path) == ["cut", "damaged", "empty.txt", "other"]
