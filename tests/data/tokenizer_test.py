from __future__ import annotations

import hashlib
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from aquila_jax.core import errors
from aquila_jax.data.tokenizer import Tokenizer

_END = "<|endoftext|>"
_MIXED = [
  "The ground is wet, and it's 1984!",
  "天地玄黄，宇宙洪荒。",
  "mixed 混合 text: 3+4=7 🙂👩‍👩‍👧 naïve café",
  "  if x:\n\t\treturn  \n\n\n",
  "\u0000\u200b\u0301 ı ß ﬁ 𝔘",
  "",
]


def _train(texts: list[str], *, vocab_size: int = 300) -> Tokenizer:
  return Tokenizer.train(
    texts,
    vocab_size=vocab_size,
    end_of_text=_END,
    field="config.data.tokenizer.vocab_size",
  )


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
  return _train(_MIXED * 2 + ["the theme of the other thing"])


@pytest.mark.parametrize("vocab_size", [257, 258, 300])
def test_a_trained_vocabulary_has_exactly_the_size_asked_for(vocab_size):
  tokenizer = _train(_MIXED, vocab_size=vocab_size)
  assert tokenizer.vocab_size == vocab_size
  vocabulary = json.loads(tokenizer.to_text())["model"]["vocab"]
  assert sorted(vocabulary.values()) == list(range(vocab_size))
  assert vocabulary[_END] == tokenizer.end_of_text_id == 0


def test_without_merges_a_token_is_a_byte():
  tokenizer = _train(["ab"], vocab_size=257)
  for text in _MIXED:
    assert len(tokenizer.encode(text)) == len(text.encode())


def test_the_first_merge_is_the_most_frequent_pair():
  # "qz" stands 6 times, "zq" 3 times (a word begins with its space).
  tokenizer = _train(["qzqz qzqz qzqz"], vocab_size=258)
  ids = tokenizer.encode("qzq")
  assert [tokenizer.decode([i]) for i in ids] == ["qz", "q"]


def test_no_token_spans_two_pieces():
  """Digits stand alone; "ab", " ab" and ",ab" are all that can be merged."""
  tokenizer = _train(["12 12 12 ab,ab ab,ab ab,ab"], vocab_size=260)
  ids = tokenizer.encode("12 12 ab,ab")
  assert [tokenizer.decode([i]) for i in ids] == (
    ["1", "2", " ", "1", "2", " ab", ",ab"]
  )


def test_text_comes_back_as_it_was(trained):
  for text in _MIXED:
    assert trained.decode(trained.encode(text)) == text
  assert trained.encode_batch(_MIXED) == [trained.encode(t) for t in _MIXED]


def test_any_text_of_unicode_comes_back(trained):
  generator = np.random.default_rng(0)
  for _ in range(100):
    codes = generator.integers(0, 0x110000, 20)
    text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())


def test_the_bytes_of_tokens_sum_to_the_bytes_of_the_text(trained):
  assert trained.token_bytes.shape == (300,)
  assert trained.token_bytes[trained.end_of_text_id] == 0
  for text in _MIXED:
    # A longer token than a byte is among those that are summed.
    ids = trained.encode(text)
    assert trained.token_bytes[ids].sum() == len(text.encode())
  assert max(trained.token_bytes[trained.encode(_MIXED[1])]) > 1


def test_a_special_token_in_a_text_is_text(trained):
  text = f"before {_END} after"
  for tokenizer in (trained, Tokenizer.from_text(trained.to_text())):
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_special_tokens_are_left_out_of_the_text(trained):
  end = trained.end_of_text_id
  assert trained.decode([end, *trained.encode("wet"), end]) == "wet"


def test_a_saved_tokenizer_is_the_same(trained, tmp_path):
  path = tmp_path / "tokenizer.json"
  trained.save(path)
  opened = Tokenizer.from_file(path, end_of_text=_END, field="path")
  assert opened.digest == trained.digest
  assert opened.digest == hashlib.sha256(path.read_bytes()).hexdigest()
  assert opened.encode_batch(_MIXED) == trained.encode_batch(_MIXED)
  assert opened.token_bytes.tolist() == trained.token_bytes.tolist()
  # The file itself says which token begins a text.
  assert Tokenizer.from_text(path.read_text()).end_of_text == _END


def test_the_file_begins_a_text_as_training_does(trained):
  """For whoever opens tokenizer.json without this package."""
  backend = tokenizers.Tokenizer.from_str(trained.to_text())
  ids = backend.encode("the ground").ids
  assert ids == [trained.end_of_text_id, *trained.encode("the ground")]


def test_training_depends_on_nothing_but_the_text():
  assert _train(_MIXED).digest == _train(_MIXED).digest
  assert _train(_MIXED).digest != _train(_MIXED[:2] * 9).digest


def test_too_little_text_for_the_vocabulary_is_refused():
  # "ab" and " ab": 257 + "ab" and " ab".
  with pytest.raises(errors.UserError) as error:
    _train(["ab ab ab"], vocab_size=300)
  assert str(error.value) == (
    "config.data.tokenizer.vocab_size=300: the text has pieces for 259 tokens"
    " only; expected at most 259, or more text"
  )


def _from_file(path: pathlib.Path, *, end_of_text: str = _END) -> Tokenizer:
  return Tokenizer.from_file(
    path, end_of_text=end_of_text, field="config.data.tokenizer.path"
  )


def _message(path: pathlib.Path, **fields: str) -> str:
  with pytest.raises(errors.UserError) as error:
    _ = _from_file(path, **fields).token_bytes
  return str(error.value)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  path = tmp_path / "a.json"
  what = f"config.data.tokenizer.path='{path}'"
  assert _message(path) == (
    f"{what}: cannot be read (No such file or directory); expected a"
    " tokenizer.json"
  )
  assert _message(tmp_path) == (
    f"config.data.tokenizer.path='{tmp_path}': cannot be read (Is a directory);"
    " expected a tokenizer.json"
  )
  path.write_bytes(b"\xff")
  assert _message(path) == (
    f"{what}: cannot be read (not UTF-8); expected a tokenizer.json"
  )
  path.write_text("")
  assert _message(path) == (
    f"{what} is no tokenizer.json: EOF while parsing a value at line 1 column 0"
  )
  path.write_text('{"a": 1}')
  assert _message(path).startswith(f"{what} is no tokenizer.json: ")
  assert "\n" not in _message(path)


def test_a_token_that_is_not_there_gets_the_nearest(trained, tmp_path):
  path = tmp_path / "a.json"
  trained.save(path)
  assert _message(path, end_of_text="<|endofdoc|>") == (
    f"config.data.tokenizer.path='{path}': has no token"
    " end_of_text='<|endofdoc|>'; did you mean '<|endoftext|>'?"
  )


def test_a_file_that_does_not_say_what_begins_a_text_is_refused(trained):
  spec = json.loads(trained.to_text())
  for processor in (None, {"type": "ByteLevel"} | _BYTE_LEVEL):
    text = json.dumps(spec | {"post_processor": processor})
    with pytest.raises(errors.UserError) as error:
      Tokenizer.from_text(text, what="tokenizer.json")
    assert str(error.value) == (
      "tokenizer.json: does not say which token begins a text; give end_of_text"
    )
    assert Tokenizer.from_text(text, end_of_text=_END).end_of_text_id == 0


_BYTE_LEVEL = {
  "add_prefix_space": True,
  "trim_offsets": True,
  "use_regex": True,
}


def _sentencepiece() -> tokenizers.Tokenizer:
  """As in Llama 2: bytes for what has no token, and a mark for a space."""
  vocabulary = ["<unk>", "<s>", "</s>"]
  vocabulary += [f"<0x{byte:02X}>" for byte in range(256)]
  vocabulary += ["▁", "a", "b", "▁a", "天", "▁a天"]
  merges = [("▁", "a"), ("▁a", "天")]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(vocabulary)},
      merges=merges,
      unk_token="<unk>",
      byte_fallback=True,
    )
  )
  backend.normalizer = normalizers.Replace(" ", "▁")
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
    ]
  )
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  backend.add_tokens(["[[ab天]]"])
  return backend


def test_bytes_of_a_tokenizer_with_byte_fallback(tmp_path):
  path = tmp_path / "a.json"
  _sentencepiece().save(str(path))
  tokenizer = _from_file(path, end_of_text="</s>")
  text = "b a天 🙂a [[ab天]]</s>"
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  spec = json.loads(path.read_text())
  vocabulary = spec["model"]["vocab"]
  # A space is one byte, a Chinese character three, an added token its text.
  sizes = {"▁": 1, "a": 1, "b": 1, "▁a": 2, "天": 3, "▁a天": 5, "<0xF0>": 1}
  for token, size in sizes.items():
    assert tokenizer.token_bytes[vocabulary[token]] == size, token
  assert vocabulary["▁a天"] in ids and vocabulary["<0xF0>"] in ids
  assert tokenizer.token_bytes[:3].tolist() == [0, 0, 0]
  added = max(vocabulary.values()) + 1
  assert added in ids
  assert tokenizer.token_bytes[added] == 9  # "[[ab" "天" "]]"
  assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_a_decoder_that_does_not_say_what_bytes_is_refused(tmp_path):
  path = tmp_path / "a.json"
  backend = tokenizers.Tokenizer(
    models.WordPiece({"[UNK]": 0, "a": 1, _END: 2}, unk_token="[UNK]")
  )
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.decoder = decoders.WordPiece()
  backend.save(str(path))
  assert _message(path) == (
    f"config.data.tokenizer.path='{path}': its decoder is WordPiece, which does"
    " not say what bytes a token stands for; expected byte-level BPE or byte"
    " fallback"
  )


def test_padding_and_truncation_of_the_file_are_not_used(trained, tmp_path):
  backend = tokenizers.Tokenizer.from_str(trained.to_text())
  backend.enable_truncation(4)
  backend.enable_padding(length=8)
  backend.save(str(tmp_path / "a.json"))
  opened = _from_file(tmp_path / "a.json")
  assert opened.encode_batch(_MIXED) == trained.encode_batch(_MIXED)


def test_ids_may_be_left_out(trained):
  """The vocabulary is as wide as the largest id."""
  spec = json.loads(trained.to_text())
  spec["model"]["vocab"]["zzzz"] = 400
  tokenizer = Tokenizer.from_text(json.dumps(spec))
  assert tokenizer.vocab_size == 401
  assert tokenizer.token_bytes[300:400].tolist() == [0] * 100
  assert tokenizer.token_bytes[400] == 4
