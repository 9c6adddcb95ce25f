from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers

from aquila_jax.core import packages
from aquila_jax.data import card, cleaning, corpora
from aquila_jax.data import prepare as prepare_lib
from aquila_jax.data.extraction import Entry
from aquila_jax.data.prepared import SPLITS, PreparedData, Split
from aquila_jax.data.tokenizer import Tokenizer


def _split_of(kit, data: PreparedData) -> dict[str, Split]:
  return {
    text: split
    for source in data.sources
    for split in SPLITS
    for text in kit.documents(data, source, split)
  }


def _hashed(kit, number: int, *, low: float, high: float) -> list[str]:
  """Texts whose hash lies in a range."""
  found = [t for t in kit.texts(400) if low <= cleaning.position(t) < high]
  assert len(found) >= number
  return found[:number]


def test_documents_come_back_from_their_tokens_in_order(kit):
  texts = kit.texts(40, seed=1) + kit.texts(20, seed=2, language="zh")
  texts += ["🙂 naïve <|endoftext|>\n\n  indented\ttab", "x=1; y=[2]\nx+y\n==3"]
  raw = ["\ufeff " + text.replace("\n", "\r\n") + " \n" for text in texts]
  source = dict(path=kit.jsonl("a.jsonl", raw), language="en")
  data = kit.prepare(kit.config({"a": source}))
  assert sorted(kit.documents(data, "a")) == sorted(texts)
  place = {text: i for i, text in enumerate(texts)}
  for split in SPLITS:
    found = [place[text] for text in kit.documents(data, "a", split)]
    assert found == sorted(found)


def test_shares_are_held_out_by_the_hash_of_the_text(kit):
  texts = kit.texts(120, seed=1)
  source = dict(path=kit.jsonl("a.jsonl", texts), language="en")
  found = _split_of(kit, kit.prepare(kit.config({"a": source}, test_share=0.2)))
  for text in texts:
    hashed = cleaning.position(text)
    expected = (
      "validation" if hashed < 0.1 else "test" if hashed < 0.3 else "train"
    )
    assert found[text] == expected


def test_a_split_does_not_depend_on_order_source_or_other_texts(kit):
  texts = kit.texts(80, seed=1)
  one = dict(path=kit.jsonl("a.jsonl", texts), language="en")
  first = _split_of(kit, kit.prepare(kit.config({"a": one}), name="first"))
  order = np.random.default_rng(0).permutation(80)
  shuffled = [texts[i] for i in order]
  two = {
    "b": dict(path=kit.jsonl("b.jsonl", shuffled[:30]), language="en"),
    "c": dict(
      path=kit.jsonl("c.jsonl", shuffled[30:] + kit.texts(30, seed=9)),
      language="en",
    ),
  }
  second = _split_of(kit, kit.prepare(kit.config(two), name="second"))
  assert {text: second[text] for text in texts} == first


@pytest.mark.parametrize(
  "low_high",
  [
    None,  # nothing lies below either share
    (0.0, 0.1),  # something for validation alone
    (0.1, 0.2),  # something for the test alone, but validation comes first
  ],
)
def test_a_split_without_a_document_gets_the_least_hash(kit, low_high):
  texts = _hashed(kit, 6, low=0.3, high=1.0)
  if low_high:
    texts += _hashed(kit, 1, low=low_high[0], high=low_high[1])
  texts.sort(key=cleaning.position)
  source = dict(path=kit.jsonl("a.jsonl", texts[3:] + texts[:3]), language="en")
  data = kit.prepare(kit.config({"a": source}))
  assert kit.documents(data, "a", "validation") == [texts[0]]
  assert kit.documents(data, "a", "test") == [texts[1]]
  assert sorted(kit.documents(data, "a", "train")) == sorted(texts[2:])


def test_copies_are_dropped_among_the_sources_of_a_language(kit):
  texts = kit.texts(40, seed=1)
  # Case and spacing do not count; the same text in another language does.
  copies = [text.upper().replace(" ", "  ") for text in texts[:7]]
  own = kit.texts(10, seed=2)
  sources = {
    "a": dict(path=kit.jsonl("a.jsonl", texts + texts[:2]), language="en"),
    "b": dict(path=kit.jsonl("b.jsonl", [*copies, *own]), language="en"),
    "c": dict(path=kit.jsonl("c.jsonl", texts), language="fr"),
  }
  data = kit.prepare(kit.config(sources))
  assert sorted(kit.documents(data, "a")) == sorted(texts)
  assert sorted(kit.documents(data, "b")) == sorted(own)
  assert sorted(kit.documents(data, "c")) == sorted(texts)
  records = data.card["sources"]
  assert [records[name]["read"] for name in "abc"] == [42, 17, 40]
  assert [records[name]["dropped"] for name in "abc"] == [
    {"exact duplicate": 2},
    {"exact duplicate": 7},
    {},
  ]
  dropped = [m for m in kit.messages if ": dropped" in m]
  assert dropped == [
    "en: dropped 9 exact and 0 near duplicates, 0 short documents",
    "fr: dropped 0 exact and 0 near duplicates, 0 short documents",
  ]


def test_near_copies_are_dropped_among_the_sources_of_a_language(kit):
  texts = [" ".join(kit.texts(3, seed=seed)) for seed in range(30)]
  near = [text + " Indeed so." for text in texts[:6]]
  own = kit.texts(10, seed=99)
  sources = {
    "a": dict(path=kit.jsonl("a.jsonl", texts), language="en"),
    "b": dict(path=kit.jsonl("b.jsonl", near + own), language="en"),
    "c": dict(path=kit.jsonl("c.jsonl", near + own), language="fr"),
  }
  data = kit.prepare(kit.config(sources))
  assert sorted(kit.documents(data, "a")) == sorted(texts)
  assert sorted(kit.documents(data, "b")) == sorted(own)
  assert sorted(kit.documents(data, "c")) == sorted(near + own)
  assert data.card["sources"]["b"]["dropped"] == {"near duplicate": 6}


def test_copies_are_kept_where_the_config_says_so(kit):
  texts = kit.texts(30, seed=1)
  rows = [*texts, texts[0], texts[1] + "!"]
  source = dict(path=kit.jsonl("a.jsonl", rows), language="en")
  for exact, threshold, number in (
    (True, 0.8, 30),
    # A near duplicate is what an exact one is as well.
    (False, 0.8, 30),
    (True, 1.0, 31),
    (False, 1.0, 32),
  ):
    rules = dict(
      min_characters=8,
      exact_duplicates=exact,
      near_duplicate_threshold=threshold,
    )
    data = kit.prepare(
      kit.config({"a": source}, cleaning=rules), name=f"{exact}{threshold}"
    )
    assert len(kit.documents(data, "a")) == number
    # Copies are in one split: none is trained on and evaluated.
    splits = [s for s in SPLITS if texts[0] in kit.documents(data, "a", s)]
    assert len(splits) == 1


def test_short_documents_are_dropped_by_their_clean_length(kit):
  texts = kit.texts(10, seed=1)
  source = dict(
    path=kit.jsonl("a.jsonl", [*texts, "1234567", " \n12345678\u200b  ", ""]),
    language="en",
  )
  data = kit.prepare(kit.config({"a": source}))
  assert sorted(kit.documents(data, "a")) == sorted([*texts, "12345678"])
  assert data.card["sources"]["a"]["dropped"] == {"too short": 2}
  # An empty document is none, however short one may be.
  rules = dict(min_characters=0)
  data = kit.prepare(kit.config({"a": source}, cleaning=rules), name="all")
  assert "" not in kit.documents(data, "a")
  assert data.card["sources"]["a"]["dropped"] == {"too short": 1}


@pytest.fixture
def bad(kit) -> dict[str, Any]:
  """A folder with a bad byte, a corrupt row, an empty file, another kind."""
  folder = kit.folder / "bad"
  folder.mkdir()
  good = [json.dumps({"text": text}) for text in kit.texts(20, seed=1)]
  good.insert(4, '{"text": "cut in the mid')
  (folder / "a.jsonl").write_text("\n".join(good))
  (folder / "b.txt").write_bytes(b"a line of good text\n\xff\xfe\nanother one")
  (folder / "c.txt").write_bytes(b"")
  (folder / "notes.md").write_text("not read")
  return dict(path=str(folder), language="en")


def test_bad_input_is_left_out_and_named(kit, bad):
  data = kit.prepare(kit.config({"mine": bad}))
  texts = [*kit.texts(20, seed=1), "a line of good text\nanother one"]
  assert sorted(kit.documents(data, "mine")) == sorted(texts)
  record = data.card["sources"]["mine"]
  assert (record["read"], record["problems"]) == (21, 3)
  assert record["ignored_files"] == 1
  folder = bad["path"]
  problems = [
    (p["file"], p["line"], p["reason"]) for p in record["first_problems"]
  ]
  assert problems == [
    (
      f"{folder}/a.jsonl",
      5,
      "is not JSON: Unterminated string starting at",
    ),
    (f"{folder}/b.txt", 2, "is not UTF-8: byte 0xff at 0"),
    (f"{folder}/c.txt", 0, "is empty"),
  ]
  assert [m for m in kit.messages if m.startswith("warning")] == [
    f"warning: mine: 3 pieces of bad input left out, the first {folder}"
    "/a.jsonl:5: is not JSON: Unterminated string starting at; the dataset card"
    " lists them",
    "warning: mine: 1 files of other kinds ignored",
  ]
  text = (kit.folder / "data" / "DATASET_CARD.md").read_text()
  for file, line, reason in problems:
    place = f"{file}:{line}" if line else file
    assert f"\n- `{place}`: {reason}\n" in text


def test_bad_input_is_refused_where_asked(kit, bad):
  rules = dict(on_bad_input="refuse", min_characters=8)
  assert kit.refusal(kit.config({"mine": bad}, cleaning=rules)) == (
    f"{bad['path']}/a.jsonl:5: is not JSON: Unterminated string starting at;"
    " repair it, or let config.data.cleaning.on_bad_input='skip' leave it out"
  )
  assert [p.name for p in kit.folder.iterdir()] == ["bad"]


def test_what_happens_is_said(kit, sources):
  data = kit.prepare(kit.config(sources))

  def size(number: int, *, seed: int, language: str) -> str:
    texts = kit.texts(number, seed=seed, language=language)
    total = sum(len(text.encode()) for text in texts)
    return f"{number} documents, {total / 1e6:.1f} MB of clean text"

  def tokens(name: str) -> str:
    counts = [f"{data.sources[name].tokens(s):,} tokens to {s}" for s in SPLITS]
    return f"{name}: {', '.join(counts)}"

  assert kit.messages == [
    "reading a",
    f"a: {size(30, seed=1, language='en')}",
    "reading b",
    f"b: {size(20, seed=2, language='zh')}",
    "en: dropped 0 exact and 0 near duplicates, 0 short documents",
    "zh: dropped 0 exact and 0 near duplicates, 0 short documents",
    "training a tokenizer of 300 tokens",
    tokens("a"),
    tokens("b"),
    f"prepared {kit.folder / 'data'}",
  ]


def test_the_files_are_as_described(kit, sources):
  data = kit.prepare(kit.config(sources))
  folder = kit.folder / "data"
  stores = [
    f"{split}/{name}/{file}"
    for split in SPLITS
    for name in sources
    for file in ("documents.bin", "tokens-00000.bin")
  ]
  assert sorted(kit.contents(folder)) == sorted(
    ["DATASET_CARD.md", "dataset.json", "tokenizer.json", *stores]
  )
  header = json.loads((folder / "dataset.json").read_text())
  assert header == data.card
  assert card.render(header) == (folder / "DATASET_CARD.md").read_text()
  for name, source in sources.items():
    path = pathlib.Path(source["path"])
    record = header["sources"][name]
    assert record["inputs"] == [
      {"path": str(path), "bytes": path.stat().st_size}
    ]
    for split in SPLITS:
      texts = kit.documents(data, name, split)
      assert record["splits"][split]["documents"] == len(texts)
      size = sum(len(text.encode()) for text in texts)
      assert record["splits"][split]["bytes"] == size


def test_the_same_config_makes_the_same_bytes(kit, sources):
  data = kit.config(sources)
  kit.prepare(data, name="one")
  kit.prepare(data, name="two")
  one, two = (kit.contents(kit.folder / name) for name in ("one", "two"))
  assert one == two


def test_a_given_tokenizer_that_changes_the_text_is_told(kit):
  path = kit.folder / "given.json"
  Tokenizer.train(
    kit.texts(50, seed=5), vocab_size=300, end_of_text="<end>", field="x"
  ).save(path)
  backend = tokenizers.Tokenizer.from_file(str(path))
  backend.normalizer = normalizers.Replace("!", "")
  backend.save(str(path))
  texts = [*kit.texts(30, seed=1), "one changed!", "another changed!"]
  source = dict(path=kit.jsonl("a.jsonl", texts), language="en")
  fields = dict(tokenizer=dict(path=str(path), end_of_text="<end>"))
  data = kit.prepare(kit.config({"a": source}, **fields))
  assert data.card["sources"]["a"]["documents_not_restored"] == 2
  assert [m for m in kit.messages if m.startswith("warning")] == [
    "warning: a: the tokens of 2 documents stand for another number of bytes"
    " than the text has; bits per byte is off"
  ]


@pytest.mark.parametrize("max_bytes", [1_000_000, 500, 3])
def test_the_tokenizer_is_trained_on_a_sample_of_training_text(
  kit, sources, monkeypatch, max_bytes
):
  """The documents with the least hashes of each language, up to a limit."""
  seen: list[str] = []
  train = Tokenizer.train

  def spy(texts, **arguments):
    seen.extend(texts)
    return train(iter(seen), **arguments)

  monkeypatch.setattr(Tokenizer, "train", spy)
  rules = dict(vocab_size=257, max_training_bytes=max_bytes)
  data = kit.prepare(kit.config(sources, tokenizer=rules))
  expected = []
  for name in ("a", "b"):  # of the languages en and zh
    texts = sorted(kit.documents(data, name, "train"), key=cleaning.position)
    raw, left = [text.encode() for text in texts], max_bytes
    for part in raw:
      if left > 0:
        # A character that the limit cuts is left out.
        expected.append(part[:left].decode(errors="ignore"))
      left -= len(part)
  assert seen == expected
  assert len(seen) == (2 if max_bytes == 3 else len(expected))


def test_texts_are_encoded_alike_in_chunks_of_any_size(
  kit, sources, monkeypatch
):
  kit.prepare(kit.config(sources), name="one")
  monkeypatch.setattr(prepare_lib, "_ENCODE_CHARACTERS", 300)
  kit.prepare(kit.config(sources), name="two")
  assert kit.contents(kit.folder / "one") == kit.contents(kit.folder / "two")


def test_paragraphs_are_documents(kit):
  texts = kit.texts(25, seed=1)
  path = kit.folder / "book.txt"
  path.write_text("\n\n".join(texts) + "\n")
  source = dict(path=str(path), language="en", txt_documents="paragraph")
  data = kit.prepare(kit.config({"book": source}))
  assert sorted(kit.documents(data, "book")) == sorted(texts)


def test_one_document_cannot_be_split(kit):
  path = kit.folder / "book.txt"
  path.write_text("\n\n".join(kit.texts(25, seed=1)))
  source = dict(path=str(path), language="en")
  need = "are left after cleaning; need at least 3, one a split"
  assert kit.refusal(kit.config({"book": source})) == (
    f"config.data.sources.book: 1 different documents of language 'en' {need};"
    " try config.data.sources.book.txt_documents='paragraph'"
  )
  # Where that is no remedy, it is not named.
  source["txt_documents"] = "paragraph"
  path.write_text("one paragraph\n\nanother one\n\none  PARAGRAPH")
  assert kit.refusal(kit.config({"book": source})) == (
    f"config.data.sources.book: 2 different documents of language 'en' {need}"
  )


def test_three_documents_are_enough(kit):
  texts = _hashed(kit, 3, low=0.3, high=1.0)
  source = dict(path=kit.jsonl("a.jsonl", texts), language="en")
  data = kit.prepare(kit.config({"a": source}, tokenizer=dict(vocab_size=257)))
  assert [len(kit.documents(data, "a", split)) for split in SPLITS] == [1, 1, 1]


@pytest.mark.parametrize(
  "low_high", [(0.0, 0.4), (0.4, 0.8)], ids=["validation", "test"]
)
def test_text_that_is_all_held_out_is_refused(kit, low_high):
  low, high = low_high
  texts = _hashed(kit, 4, low=low, high=high)
  source = dict(path=kit.jsonl("a.jsonl", texts), language="en")
  config = kit.config({"a": source}, validation_share=0.4, test_share=0.4)
  assert kit.refusal(config) == (
    "config.data.sources.a: no document is left to train on: 4 read, 4 held"
    " out, 0 pieces of bad input"
  )


def test_a_source_of_copies_is_refused(kit):
  texts = kit.texts(30, seed=1)
  path = kit.folder / "b.jsonl"
  kit.jsonl("b.jsonl", [*texts[:3], "short", texts[4] + "!!"])
  path.write_text(path.read_text() + "no json\n")
  sources = {
    "a": dict(path=kit.jsonl("a.jsonl", texts), language="en"),
    "b": dict(path=str(path), language="en"),
  }
  assert kit.refusal(kit.config(sources)) == (
    "config.data.sources.b: no document is left to train on: 5 read, 1 too"
    " short, 3 exact duplicate, 1 near duplicate, 0 held out, 1 pieces of bad"
    " input"
  )


def test_no_more_than_max_bytes_are_taken(kit):
  """Whole documents from the first on, counted when they are clean."""
  texts = ["天" * 10 + str(i) for i in range(10)]  # of 31 bytes
  raw = [f"  {text}\n\n" for text in texts]
  source = dict(path=kit.jsonl("a.jsonl", raw), language="zh")
  fields = dict(tokenizer=dict(vocab_size=257))
  for max_bytes, number in ((93, 3), (123, 3), (124, 4), (309, 9), (310, 10)):
    data = kit.prepare(
      kit.config({"a": source | dict(max_bytes=max_bytes)}, **fields),
      name=f"data{max_bytes}",
    )
    assert sorted(kit.documents(data, "a")) == texts[:number]
    assert data.card["sources"]["a"]["read"] == number


def test_the_licence_is_in_the_card(kit, monkeypatch):
  """Of the config, or else what a corpus says of itself."""
  texts = kit.texts(60, seed=1)
  entries = [Entry(text, "f", 1) for text in texts]
  corpus = dataclasses.replace(
    corpora.CORPORA["jionlp"], extract=lambda path: iter(entries)
  )
  monkeypatch.setitem(corpora.CORPORA, "jionlp", corpus)
  monkeypatch.setattr(packages, "fetch", lambda corpus, progress: kit.folder)
  sources = {}
  for number, licence in enumerate(("CC0-1.0", "not stated")):
    own = kit.texts(20, seed=10 + number)
    sources[f"own{number}"] = dict(
      path=kit.jsonl(f"{number}.jsonl", own), language="en", licence=licence
    )
    sources[f"corpus{number}"] = dict(
      path="corpus:jionlp", language=f"language{number}", licence=licence
    )
  data = kit.prepare(kit.config(sources))
  expected = {
    "corpus0": "CC0-1.0",
    "corpus1": "Apache-2.0",
    "own0": "CC0-1.0",
    "own1": "not stated",
  }
  found = {n: r["licence"] for n, r in data.card["sources"].items()}
  assert found == expected
  text = (kit.folder / "data" / "DATASET_CARD.md").read_text()
  for name, licence in expected.items():
    row = next(
      line for line in text.split("\n") if line.startswith(f"| {name} ")
    )
    assert f" | 1 | {licence} | " in row
