from __future__ import annotations

import re

from aquila_jax.data.prepared import PreparedData
from tests.cli.commands import SMOKE, names, succeeded


def test_text_is_prepared_once(commands, data, tmp_path):
  output = tmp_path / "prepared"
  command = ("prepare_data", SMOKE, f"--output={output}")
  first = succeeded(commands.run(*command))
  assert first.out == f"Dataset card: {output}/DATASET_CARD.md\n"
  assert first.last_line == f"prepared {output}"
  assert names(tmp_path) == ["prepared"]
  # The same as of the library, in another process.
  assert PreparedData.open(output).digest == PreparedData.open(data).digest
  card = (data / "DATASET_CARD.md").read_text(encoding="utf-8")
  assert (output / "DATASET_CARD.md").read_text(encoding="utf-8") == card

  stamps = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
  second = succeeded(commands.run(*command))
  assert (second.out, second.err) == (first.out, f"{output} is prepared\n")
  assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == stamps


def test_mistakes_are_refused(commands, data, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("")
  output = f"--output={tmp_path / 'new'}"
  commands.assert_refused(
    {
      "an output of another kind": (
        ("prepare_data", SMOKE, f"--output={tmp_path / 'mine'}"),
        f"{tmp_path / 'mine'} exists and is not prepared data; choose another"
        " output",
      ),
      "an output of another config": (
        (
          "prepare_data",
          SMOKE,
          f"--output={data}",
          "--config.data.cleaning.min_characters=17",
        ),
        f"{data} was prepared with another config"
        " (config.data.cleaning.min_characters: 16 -> 17); choose another"
        " output or delete it",
      ),
      "a source that is missing": (
        (
          "prepare_data",
          SMOKE,
          output,
          "--config.data.sources.en.path=experiments/data/smoke/e.txt",
        ),
        "config.data.sources.en.path='experiments/data/smoke/e.txt': there is"
        " no such file or folder; did you mean"
        " 'experiments/data/smoke/en.txt'?",
      ),
    }
  )
  assert names(tmp_path) == ["mine"]
  assert names(tmp_path / "mine") == ["thesis.txt"]


def test_refusal_late_in_the_work_leaves_nothing(commands, tmp_path):
  refused = commands.run(
    "prepare_data",
    SMOKE,
    f"--output={tmp_path / 'new'}",
    "--config.data.tokenizer.vocab_size=100000",
  )
  assert (refused.code, refused.out) == (2, "")
  assert re.fullmatch(
    r"aquila_jax: config\.data\.tokenizer\.vocab_size=100000: the text has"
    r" pieces for (\d+) tokens only; expected at most \1, or more text",
    refused.last_line,
  )
  assert names(tmp_path) == []
