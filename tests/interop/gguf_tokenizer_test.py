"""Tokenizers out of GGUF metadata, against published rules and by hand."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  trainers,
)

from aquila_jax.core.errors import UserError
from aquila_jax.interop import gguf_tokenizer

TEXTS = [
  "",
  " ",
  "The river rose in 2024, and by morning 1234567 houses were gone.",
  "  two  spaces   three\tand a tab \n\nnew\r\nlines\n \n  end  ",
  "It's we'LL they'd I'VE 'tis don’t",
  "def f(x):\n    return x**2 + 3.14159e-10 # 100%",
  "中文的句子，与 emoji 😀👩‍👩‍👧 一起。１２３",
  "naïve café — cafe\u0301 ŁÓDŹ ½ ²",
  "a<|end|>b <|end|> c<tool>d",
  "!!!???...\n\n---",
]
TRAINING = [*TEXTS[2:8], "the the the river river houses houses 1234 1234 123"]

# The rules as the models' tokenizer.json have them.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _published(pre: str) -> Tokenizer:
  """Without vocabulary."""
  tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
  bytes_only: Any = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm")
  )
  before = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
  }[pre]
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_only])  # pyright: ignore[reportAttributeAccessIssue]
  tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  if pre == "qwen2":
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
  return tokenizer


@functools.cache
def _trained(pre: str) -> tuple[str, dict[str, Any]]:
  """A tokenizer.json, and the metadata that a converter makes of it."""
  tokenizer = _published(pre)
  tokenizer.train_from_iterator(
    TRAINING * 3,
    trainers.BpeTrainer(
      vocab_size=420,
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  tokenizer.add_special_tokens(["<|end|>"])
  tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
  text = tokenizer.to_str()
  model = json.loads(text)["model"]
  size = tokenizer.get_vocab_size()
  tokens = [tokenizer.id_to_token(i) for i in range(size)]
  kinds = {"<|end|>": 3, "<tool>": 4}
  return text, {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [kinds.get(str(token), 1) for token in tokens],
    "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
  }


def _made(metadata: dict[str, Any]) -> Tokenizer:
  text = gguf_tokenizer.to_json(metadata, what="it")
  assert text is not None
  return Tokenizer.from_str(text)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_are_those_of_the_published_tokenizer(pre, text):
  original, metadata = _trained(pre)
  expected, found = Tokenizer.from_str(original), _made(metadata)
  ids = found.encode(text).ids
  assert ids == expected.encode(text).ids
  assert found.decode(ids) == expected.decode(ids)
  whole = found.decode(ids, skip_special_tokens=False)
  if pre == "qwen2":  # NFC makes one character of e and its accent
    assert whole == normalizers.NFC().normalize_str(text)
  else:
    assert whole == text


# Every string of digits is a token, so that a piece is a token.
DIGITS = "0123456789"
_GROUPS = ["12", "123", "1234", "12345"]


def _digits(pre: str, text: str) -> list[str]:
  tokens = [*DIGITS, "Ġ", *_GROUPS, "45"]
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "1234 5", "4 5"],
  }
  return _made(metadata).encode(text).tokens


@pytest.mark.parametrize(
  ("pre", "expected"),
  [
    ("gpt-2", ["12345"]),
    ("smollm", ["1", "2", "3", "4", "5"]),
    ("llama-bpe", ["123", "45"]),
    ("qwen2", ["1", "2", "3", "4", "5"]),
  ],
)
def test_numbers_are_cut_as_each_rule_says(pre, expected):
  assert _digits(pre, "12345") == expected


def test_whole_pieces_come_before_merges_in_llama3_only():
  """Its vocabulary has tokens that its merges do not reach."""
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "c", "bc", "abc"],
    "tokenizer.ggml.merges": ["b c"],
  }
  for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["a", "bc"])):
    found = _made(metadata | {"tokenizer.ggml.pre": pre})
    assert found.encode("abc").tokens == expected


def test_gpt2_is_the_rule_where_none_is_named():
  _, metadata = _trained("gpt-2")
  unnamed = {k: v for k, v in metadata.items() if k != "tokenizer.ggml.pre"}
  assert gguf_tokenizer.to_json(unnamed, what="it") == (
    gguf_tokenizer.to_json(metadata, what="it")
  )


# SentencePiece: pieces with scores; what is in none of them is bytes.
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_PIECES = {
  **{"\u2581": -9.0, "a": -10.0, "b": -10.5, "n": -11.0, "s": -11.5},
  **{"中": -12.0, "文": -12.5, "1": -13.0, "2": -13.5},
  # Better scores are merged first, wherever they stand.
  **{"an": -1.0, "ba": -2.0, "ban": -2.5, "ana": -3.0, "banana": -4.0},
  **{"nas": -4.5, "\u2581ban": -5.0, "\u2581\u2581": -5.5, "12": -6.0},
  **{"中文": -6.5, "anas": -7.0, "\u2581a": -8.0},
}
_SPECIAL = ["<unk>", "<s>", "</s>"]


def _sentencepiece(**changes: Any) -> dict[str, Any]:
  tokens = [*_SPECIAL, *_BYTES, *_PIECES]
  metadata = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": [0.0] * 259 + list(_PIECES.values()),
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(_PIECES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 0,
  }
  return metadata | {
    f"tokenizer.ggml.{name}": value for name, value in changes.items()
  }


def _by_scores(text: str, *, prefix: str = "\u2581") -> list[str]:
  """The neighbours with the best union are joined, until there are none."""
  symbols = list(prefix * bool(text) + text.replace(" ", "\u2581"))
  while True:
    unions = [
      (_PIECES[a + b], -i)
      for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
      if a + b in _PIECES
    ]
    if not unions:
      break
    i = -max(unions)[1]
    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
  found = []
  for symbol in symbols:
    if symbol in _PIECES:
      found.append(symbol)
    else:
      found += [f"<0x{byte:02X}>" for byte in symbol.encode()]
  return found


SENTENCES = [
  "",
  "banana",
  "banana bananas",
  "  ban  an anas",
  "abba nas bana",
  "中文 a中 文",
  "1212 12\n21",
  "😀 ban\r\n",
  "xyz",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_sentencepiece_joins_by_scores(text):
  tokenizer = _made(_sentencepiece())
  found = tokenizer.encode(text)
  assert found.tokens == ["<s>", *_by_scores(text)]
  assert tokenizer.decode(found.ids) == text
  plain = _made(_sentencepiece(add_space_prefix=False, add_bos_token=False))
  found = plain.encode(text)
  assert found.tokens == _by_scores(text, prefix="")
  assert plain.decode(found.ids) == text


def test_sentencepiece_by_hand():
  tokenizer = _made(_sentencepiece(add_bos_token=False))
  # an (-1) twice; of ▁ b an an a then ban (-2.5), ana (-3) and of these two
  # banana (-4), before ▁ban (-5) could be.
  assert tokenizer.encode("banana").tokens == ["\u2581", "banana"]
  assert tokenizer.encode("中文é").tokens == [
    *("\u2581", "中文", "<0xC3>", "<0xA9>")
  ]


@pytest.mark.parametrize(
  ("base", "changes", "expected"),
  [
    ("gpt2", {}, False),
    ("gpt2", {"bos_token_id": 3}, False),
    ("gpt2", {"bos_token_id": 3, "add_bos_token": True}, True),
    ("gpt2", {"bos_token_id": 3, "pre": "llama-bpe"}, True),
    (
      "gpt2",
      {"bos_token_id": 3, "pre": "llama-bpe", "add_bos_token": False},
      False,
    ),
    ("gpt2", {"add_bos_token": True}, False),  # which one it does not say
    ("llama", {}, True),
    ("llama", {"add_bos_token": False}, False),
  ],
)
def test_a_text_begins_with_what_the_file_says(base, changes, expected):
  metadata = _sentencepiece()
  if base == "gpt2":
    metadata = {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": ["a", "b", "ab", "<|begin|>"],
      "tokenizer.ggml.token_type": [1, 1, 1, 3],
      "tokenizer.ggml.merges": ["a b"],
    }
  metadata |= {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
  tokenizer = _made(metadata)
  begin: int = metadata.get("tokenizer.ggml.bos_token_id", -1)
  ids = tokenizer.encode("ab").ids
  assert (ids[0] == begin) == expected
  pair = tokenizer.encode("ab", "ab").ids
  assert pair.count(begin) == (2 if expected else 0)


def test_a_file_without_a_tokenizer_has_none():
  assert gguf_tokenizer.to_json({}, what="it") is None
  none = {"tokenizer.ggml.model": "none"}
  assert gguf_tokenizer.to_json(none, what="it") is None


_GPT2 = {
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.tokens": ["a", "b", "ab"],
}


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    (
      {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]},
      "tokenizer.ggml.model='bert' is not known; expected gpt2 or llama, or"
      " give --tokenizer=tokenizer.json",
    ),
    ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.tokens is missing"),
    (
      _GPT2 | {"tokenizer.ggml.pre": "deepseek"},
      "tokenizer.ggml.pre='deepseek' is not known; expected one of gpt-2,"
      " smollm, llama-bpe, qwen2, or give --tokenizer=tokenizer.json",
    ),
    (
      _GPT2 | {"tokenizer.ggml.model": "llama"},
      "tokenizer.ggml.scores is missing",
    ),
    (
      _GPT2 | {"tokenizer.ggml.merges": ["a c"]},
      "its tokenizer is damaged: Exception: Error while initializing BPE: Token"
      " `c` out of vocabulary; give --tokenizer=tokenizer.json",
    ),
    (
      _GPT2
      | {
        "tokenizer.ggml.bos_token_id": 7,
        "tokenizer.ggml.add_bos_token": True,
      },
      "its tokenizer is damaged: IndexError: list index out of range; give"
      " --tokenizer=tokenizer.json",
    ),
  ],
)
def test_what_makes_no_tokenizer_is_refused(metadata, message):
  with pytest.raises(UserError) as caught:
    gguf_tokenizer.to_json(metadata, what="it")
  assert str(caught.value) == f"it: {message}"
