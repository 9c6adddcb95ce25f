from __future__ import annotations

from typing import Any

import pytest

from aquila_jax.data import card


def _record(**fields: Any) -> dict[str, Any]:
  splits = {
    "train": {"documents": 1200, "bytes": 34_567, "tokens": 8_900},
    "validation": {"documents": 3, "bytes": 40, "tokens": 12},
    "test": {"documents": 2, "bytes": 30, "tokens": 9},
  }
  defaults = {
    "language": "en",
    "weight": 3.0,
    "licence": "MIT",
    "description": "text/*.txt",
    "read": 1300,
    "dropped": {"too short": 5, "near duplicate": 90},
    "problems": 0,
    "first_problems": [],
    "ignored_files": 0,
    "documents_not_restored": 0,
    "splits": splits,
  }
  return defaults | fields


def _header(sources: dict[str, Any], *, path: str = "") -> dict[str, Any]:
  return {
    "package_version": "1.2.3",
    "digest": "d" * 64,
    "tokenizer": {
      "path": path,
      "sha256": "e" * 64,
      "vocab_size": 8192,
      "end_of_text": "<|endoftext|>",
      "end_of_text_id": 0,
    },
    "sources": sources,
  }


def test_the_whole_card():
  text = card.render(_header({"essays": _record()}))
  sizes = "1,200 | 34,567 | 8,900 | 3 | 40 | 12 | 2 | 30 | 9"
  assert text.split("\n") == [
    "# Dataset card",
    "",
    "Prepared by aquila_jax 1.2.3. Identity (SHA-256 of tokens, tokenizer and"
    " mixture):",
    "",
    f"`{'d' * 64}`",
    "",
    "## Sources",
    "",
    "| source | language | weight | licence | text |",
    "| --- | --- | --- | --- | --- |",
    "| essays | en | 3 | MIT | text/*.txt |",
    "",
    "## Sizes",
    "",
    "A document belongs to a split by a hash of its text, after duplicates have"
    " been dropped. Bytes are UTF-8 of clean text; tokens count end of text"
    " before and after every document.",
    "",
    "| language | source | train documents | train bytes | train tokens |"
    " validation documents | validation bytes | validation tokens |"
    " test documents | test bytes | test tokens |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    f"| en | essays | {sizes} |",
    f"| en | all | {sizes} |",
    "",
    "## Left out",
    "",
    "| source | read | too short | exact duplicate | near duplicate |",
    "| --- | --- | --- | --- | --- |",
    "| essays | 1,300 | 5 | 0 | 90 |",
    "",
    "## Bad input",
    "",
    "None.",
    "",
    "## Tokenizer",
    "",
    f"byte-level BPE, 8,192 tokens, SHA-256 `{'e' * 64}`. End of text is"
    " `<|endoftext|>` (0).",
    "",
  ]


def test_sizes_are_summed_over_the_sources_of_a_language():
  small = {
    split: {"documents": 1, "bytes": 10, "tokens": 4}
    for split in ("train", "validation", "test")
  }
  header = _header(
    {
      "essays": _record(),
      "poems": _record(language="zh", splits=small),
      "notes": _record(splits=small),
    }
  )
  rows = [
    line for line in card.render(header).split("\n") if " | all | " in line
  ]
  assert rows == [
    "| en | all | 1,201 | 34,577 | 8,904 | 4 | 50 | 16 | 3 | 40 | 13 |",
    "| zh | all | 1 | 10 | 4 | 1 | 10 | 4 | 1 | 10 | 4 |",
  ]


def test_what_was_left_out_is_named_with_file_and_line():
  problems = [
    {"file": "a.txt", "line": 3, "reason": "is not UTF-8"},
    {"file": "b.txt", "line": 0, "reason": "is empty"},
  ]
  record = _record(
    problems=1234,
    first_problems=problems,
    ignored_files=2,
    documents_not_restored=7,
  )
  text = card.render(_header({"fine": _record(), "essays": record}))
  _, _, section = text.partition("## Bad input\n\n")
  section, _, _ = section.partition("\n\n## Tokenizer")
  assert section == (
    "essays: 2 files of other kinds ignored.\n\n"
    "essays: 7 documents whose tokens stand for another number of bytes than"
    " the text has.\n\n"
    "essays: 1,234 pieces left out, the first 2:\n\n"
    "- `a.txt:3`: is not UTF-8\n"
    "- `b.txt`: is empty"
  )


@pytest.mark.parametrize(
  ("weight", "shown"), [(1.0, "1"), (0.25, "0.25"), (1e-7, "1e-07")]
)
def test_a_weight_is_shown_as_it_was_written(weight, shown):
  text = card.render(_header({"essays": _record(weight=weight)}))
  assert f"| essays | en | {shown} | MIT |" in text


def test_a_given_tokenizer_is_named():
  text = card.render(_header({"essays": _record()}, path="mine.json"))
  assert "given (mine.json), 8,192 tokens" in text


def test_a_bar_does_not_end_a_cell():
  assert card.table(("a", "b"), [("x|y", "z")]) == (
    "| a | b |\n| --- | --- |\n| x\\|y | z |"
  )
