"""The dataset card in the report: dataset.json of prepared data as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aquila_jax.evaluation.markup import Markup, element
from aquila_jax.evaluation.tables import Table

_SPLITS = ("train", "validation", "test")
_KINDS = ("documents", "bytes", "tokens")

Card = Mapping[str, Any]


def tables_of(card: Card) -> list[Markup]:
  """Headings and tables, in the order of DATASET_CARD.md.

  Args:
    card: the content of dataset.json.

  Returns:
    Elements of the section.
  """
  sources = card.get("sources", {})
  parts: list[Markup] = []
  if sources:
    parts += [
      element("h3", "Sources"),
      _sources(sources).html(),
      element("h3", "Sizes"),
      _note(
        "A document belongs to a split by a hash of its text, after duplicates"
        " were dropped. Bytes are UTF-8 of the cleaned text."
      ),
      _sizes(sources).html(),
      element("h3", "Left out"),
      _left_out(sources).html(),
    ]
  tokenizer = card.get("tokenizer")
  if tokenizer:
    parts += [element("h3", "Tokenizer"), _tokenizer(tokenizer)]
  if card.get("digest"):
    parts.append(
      _note(
        f"SHA-256 of tokens, tokenizer and mixture: {card['digest']}.",
      )
    )
  return parts


def _note(words: str) -> Markup:
  return element("p", words, class_="note digest")


def _sources(sources: Card) -> Table:
  return Table(
    columns=("source", "language", "weight", "licence", "text"),
    rows=[
      (
        name,
        str(record.get("language", "")),
        f"{record.get('weight', 1):g}",
        str(record.get("licence", "not stated")),
        str(record.get("description", "")),
      )
      for name, record in sources.items()
    ],
    words=("language", "licence", "text"),
  )


def _sizes(sources: Card) -> Table:
  """A row a source, and the sum of every language of several sources."""
  rows = []
  languages = sorted({record["language"] for record in sources.values()})
  for language in languages:
    members = {
      name: _counts(record)
      for name, record in sources.items()
      if record["language"] == language
    }
    rows += [(language, name, *counts) for name, counts in members.items()]
    if len(members) > 1:
      total = map(sum, zip(*members.values(), strict=True))
      rows.append((language, "all", *total))
  titles = [f"{split} {kind}" for split in _SPLITS for kind in _KINDS]
  return Table(
    columns=("language", "source", *titles),
    rows=[
      (language, name, *(f"{count:,}" for count in counts))
      for language, name, *counts in rows
    ],
    words=("source",),
  )


def _counts(record: Card) -> list[int]:
  splits = record.get("splits", {})
  return [
    int(splits.get(split, {}).get(kind, 0))
    for split in _SPLITS
    for kind in _KINDS
  ]


def _left_out(sources: Card) -> Table:
  reasons: dict[str, None] = {}
  for record in sources.values():
    reasons |= dict.fromkeys(record.get("dropped", {}))
  return Table(
    columns=("source", "documents read", *reasons, "pieces of bad input"),
    rows=[
      (
        name,
        f"{record.get('read', 0):,}",
        *(f"{record.get('dropped', {}).get(r, 0):,}" for r in reasons),
        f"{record.get('problems', 0):,}",
      )
      for name, record in sources.items()
    ],
  )


def _tokenizer(tokenizer: Card) -> Markup:
  path = tokenizer.get("path")
  made = f"Given ({path})" if path else "Byte-level BPE trained on the text"
  return element(
    "p",
    f"{made}: {tokenizer.get('vocab_size', 0):,} tokens. End of text is"
    f" {tokenizer.get('end_of_text', '')}.",
  )
