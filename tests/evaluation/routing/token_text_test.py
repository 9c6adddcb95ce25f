from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models

from aquila_jax.data.tokenizer import Tokenizer
from aquila_jax.evaluation.routing.token_text import (
  CLASSES,
  TokenText,
  classify,
  visible,
)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (" the", "Latin"),
    ("don't", "Latin"),
    ("B2B", "Latin"),
    ("Ａ", "Latin"),
    ("Ⅳ", "Latin"),
    ("春天", "CJK"),
    ("〇々", "CJK"),
    ("カナ", "Kana"),
    ("ｶﾅ", "Kana"),
    ("한글", "Hangul"),
    ("река", "Cyrillic"),
    ("λ", "Greek"),
    ("نهر", "Arabic"),
    ("נהר", "Hebrew"),
    ("नदी", "Devanagari"),
    ("แม่น้ำ", "Thai"),
    ("მდინარე", "other letters"),
    ("AI春", "two scripts"),
    (" 2026", "digits"),
    ("$5.00", "digits"),
    ("３", "digits"),
    ("，", "punctuation"),
    ("。\n", "punctuation"),
    ("...", "punctuation"),
    ("+", "symbols, emoji"),
    ("´", "symbols, emoji"),
    ("🙂", "symbols, emoji"),
    ("👩🏽\u200d🚀", "symbols, emoji"),
    (" \n\t", "whitespace"),
    ("\u3000", "whitespace"),
    ("\u200b", "other"),
    ("", "other"),
  ],
)
def test_classes_of_text(text, expected):
  assert classify(text.encode()) == expected
  assert expected in CLASSES


def test_bytes_that_are_no_character_are_fragments():
  assert classify("春".encode()[:2]) == "byte fragment"
  assert classify("春".encode()[2:]) == "byte fragment"
  assert visible("春".encode()[:2]) == "⟨E6 98⟩"


def test_what_cannot_be_seen_is_shown():
  assert visible(b" a\tb\r\n") == "␣a⇥b␍↵"
  assert visible("\u200b\x07\u00a0".encode()) == "⟨U+200B⟩⟨U+0007⟩⟨U+00A0⟩"


def _all_tokens(text: TokenText, size: int) -> bytes:
  return b"".join(text.text(token) for token in range(size))


def test_tokens_of_byte_level_bpe_are_bytes():
  tokenizer = Tokenizer.train(
    ["春天 the the 🙂"],
    vocab_size=262,
    end_of_text="<|endoftext|>",
    field="vocab_size",
  )
  text = TokenText(tokenizer.to_text())
  sample = "the 春天 🙂\n1"
  ids = tokenizer.encode(sample)
  assert b"".join(map(text.text, ids)) == sample.encode()
  end = tokenizer.end_of_text_id
  assert text.token_class(end) == "special"
  assert text.shown(end) == "<|endoftext|>"
  # All 256 bytes are tokens, and those from 0x80 on are no characters.
  single = [text.text(i) for i in range(262) if len(text.text(i)) == 1]
  assert sorted(single) == [bytes([byte]) for byte in range(256)]
  fragments = [i for i in range(262) if text.token_class(i) == "byte fragment"]
  assert len(fragments) >= 128
  assert text.text(10_000) == b"" and text.shown(10_000) == "#10000"


def test_tokens_of_byte_fallback():
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={"<unk>": 0, "<0xE6>": 1, "<0x41>": 2, "▁the": 3, "春": 4},
      merges=[],
      unk_token="<unk>",
    )
  )
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  backend.add_special_tokens(["<unk>"])
  text = TokenText(backend.to_str())
  assert [text.token_class(i) for i in range(5)] == [
    "special",
    "byte fragment",
    "Latin",
    "Latin",
    "CJK",
  ]
  assert [text.shown(i) for i in range(1, 5)] == ["⟨E6⟩", "A", "␣the", "春"]


def test_other_tokenizers_stand_for_their_names():
  backend = tokenizers.Tokenizer(models.WordLevel({"river": 0, "é": 1}))
  assert json.loads(backend.to_str())["decoder"] is None
  text = TokenText(backend.to_str())
  assert [text.text(i) for i in (0, 1)] == [b"river", "é".encode()]


def test_a_model_without_tokenizer_reads_bytes():
  text = TokenText(None)
  assert [text.token_class(i) for i in (65, 48, 10, 0xE6, 300)] == [
    "Latin",
    "digits",
    "whitespace",
    "byte fragment",
    "other",
  ]
  assert text.shown(32) == "␣" and not text.is_special(0)
