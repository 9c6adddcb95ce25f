"""The dataset card: what prepared data are made of, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SPLITS = ("train", "validation", "test")


def render(header: dict[str, Any]) -> str:
  """DATASET_CARD.md from dataset.json.

  Args:
    header: the content of dataset.json.

  Returns:
    Markdown.
  """
  records = header["sources"]
  tokenizer = header["tokenizer"]
  made = (
    f"given ({tokenizer['path']})" if tokenizer["path"] else "byte-level BPE"
  )
  parts = [
    "# Dataset card",
    f"Prepared by aquila_jax {header['package_version']}. Identity (SHA-256 of"
    " tokens, tokenizer and mixture):",
    f"`{header['digest']}`",
    "## Sources",
    table(
      ("source", "language", "weight", "licence", "text"),
      [
        (
          name,
          record["language"],
          f"{record['weight']:g}",
          record["licence"],
          record["description"],
        )
        for name, record in records.items()
      ],
    ),
    "## Sizes",
    "A document belongs to a split by a hash of its text, after duplicates have"
    " been dropped. Bytes are UTF-8 of clean text; tokens count end of text"
    " before and after every document.",
    table(("language", "source", *_size_titles()), _size_rows(records)),
    "## Left out",
    table(
      ("source", "read", "too short", "exact duplicate", "near duplicate"),
      [_dropped_row(name, record) for name, record in records.items()],
    ),
    *_problems(records),
    "## Tokenizer",
    f"{made}, {tokenizer['vocab_size']:,} tokens, SHA-256"
    f" `{tokenizer['sha256']}`. End of text is"
    f" `{tokenizer['end_of_text']}` ({tokenizer['end_of_text_id']}).",
  ]
  return "\n\n".join(parts) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; bars in cells are escaped."""
  lines = [titles, ["---"] * len(titles), *rows]
  return "\n".join(
    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
    for line in lines
  )


def _size_titles() -> list[str]:
  kinds = ("documents", "bytes", "tokens")
  return [f"{split} {kind}" for split in _SPLITS for kind in kinds]


def _sizes(record: dict[str, Any]) -> list[int]:
  kinds = ("documents", "bytes", "tokens")
  return [record["splits"][split][kind] for split in _SPLITS for kind in kinds]


def _size_rows(records: dict[str, dict[str, Any]]) -> list[list[str]]:
  """One row a source, and the sum of each language."""
  rows = []
  languages = sorted({record["language"] for record in records.values()})
  for language in languages:
    members = {
      name: _sizes(record)
      for name, record in records.items()
      if record["language"] == language
    }
    for name, sizes in members.items():
      rows.append([language, name, *(f"{size:,}" for size in sizes)])
    total = [sum(column) for column in zip(*members.values(), strict=True)]
    rows.append([language, "all", *(f"{size:,}" for size in total)])
  return rows


def _dropped_row(name: str, record: dict[str, Any]) -> list[str]:
  reasons = ("too short", "exact duplicate", "near duplicate")
  dropped = [record["dropped"].get(reason, 0) for reason in reasons]
  return [name, *(f"{count:,}" for count in (record["read"], *dropped))]


def _problems(records: dict[str, dict[str, Any]]) -> list[str]:
  """What could not be read, with file and line."""
  parts = ["## Bad input"]
  for name, record in records.items():
    if record["ignored_files"]:
      parts.append(
        f"{name}: {record['ignored_files']:,} files of other kinds ignored."
      )
    if record["documents_not_restored"]:
      parts.append(
        f"{name}: {record['documents_not_restored']:,} documents whose tokens"
        " stand for another number of bytes than the text has."
      )
    if not record["problems"]:
      continue
    first = record["first_problems"]
    shown = "\n".join(f"- {_place(p)}: {p['reason']}" for p in first)
    parts.append(
      f"{name}: {record['problems']:,} pieces left out, the first"
      f" {len(first)}:\n\n{shown}"
    )
  return parts if len(parts) > 1 else [*parts, "None."]


def _place(problem: dict[str, Any]) -> str:
  line = f":{problem['line']}" if problem["line"] else ""
  return f"`{problem['file']}{line}`"
