from __future__ import annotations

import dataclasses
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
