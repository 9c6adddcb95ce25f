from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import SourceConfig
from aquila_jax.data import loader, raw_text
from aquila_jax.data.prepared import SPLITS, PreparedData
from aquila_jax.data.tokenizer import Tokenizer

_TEXTS = ["One  \r\nline.", "天地玄黄", " \u200b ", "x", "One  \r\nline."]
# Cleaned; short texts and copies stay, the empty one goes.
_CLEAN = ["One\nline.", "天地玄黄", "x", "One\nline."]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return Tokenizer.train(
    ["the line of one text"],
    vocab_size=260,
    end_of_text="<|end|>",
    field="vocab_size",
  )


def _tokenize(
  path: str, tokenizer: Tokenizer, **arguments: Any
) -> PreparedData:
  defaults: dict[str, Any] = dict(progress=_refuse)
  return raw_text.tokenize(
    SourceConfig(path=path, language="en"),
    tokenizer=tokenizer,
    field="--text",
    **(defaults | arguments),
  )


def _refuse(message: str) -> None:
  raise AssertionError(message)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_every_document_is_tokenized_as_prepared_text_is(kit, tokenizer, split):
  path = kit.jsonl("a.jsonl", _TEXTS)
  data = _tokenize(path, tokenizer, split=split)
  assert list(data.sources) == ["text"]
  assert data.languages == ("en",)
  store = data.sources["text"].splits[split]
  end = tokenizer.end_of_text_id
  documents = [
    store.read(i, 0, int(store.lengths[i])).tolist()
    for i in range(store.num_documents)
  ]
  assert documents == [[end, *tokenizer.encode(t), end] for t in _CLEAN]
  # 9 bytes, 4 characters of 3 bytes, 1 byte and 9 bytes.
  assert store.text_bytes == 9 + 12 + 1 + 9
  tokens = [token for document in documents for token in document]
  assert data.token_bytes[tokens].sum() == store.text_bytes
  # The others are there, and empty.
  sizes = {s: data.tokens(s) for s in data.sources["text"].splits}
  assert sizes == dict.fromkeys(SPLITS, 0) | {split: len(tokens)}


def test_it_is_evaluated_like_prepared_data(kit, tokenizer):
  data = _tokenize(kit.jsonl("a.jsonl", _TEXTS), tokenizer)
  batches = loader.evaluation_batches(
    data, split="test", language="en", batch_size=2, sequence_length=16
  )
  number = sum(int(batch.weights.sum()) for batch in batches)
  # Every token of a text, and the end of it.
  assert number == sum(len(tokenizer.encode(text)) + 1 for text in _CLEAN)


def test_the_tokenizer_of_the_data_is_the_one_given(kit, tokenizer):
  data = _tokenize(kit.jsonl("a.jsonl", _TEXTS), tokenizer)
  assert data.tokenizer().digest == tokenizer.digest
  assert data.vocab_size == 260
  assert data.path is None
  data.verify()


def test_the_digest_is_of_text_and_tokenizer(kit, tokenizer):
  path = kit.jsonl("a.jsonl", _TEXTS)
  digest = _tokenize(path, tokenizer).digest
  assert len(bytes.fromhex(digest)) == 32
  # The same text with other blanks is the same.
  assert _tokenize(kit.jsonl("b.jsonl", _CLEAN), tokenizer).digest == digest
  joined = ["One\nline.天地玄黄", "x", "One\nline."]
  other = Tokenizer.train(
    ["the line of one text"],
    vocab_size=261,
    end_of_text="<|end|>",
    field="vocab_size",
  )
  digests = {
    digest,
    _tokenize(kit.jsonl("c.jsonl", joined), tokenizer).digest,
    _tokenize(path, other).digest,
  }
  assert len(digests) == 3


def test_bad_input_is_left_out_with_a_warning(kit, tokenizer):
  path = kit.folder / "a.jsonl"
  path.write_bytes(b'{"text": "one"}\n{"text": 3}\nnot json\n{"text": "two"}\n')
  messages: list[str] = []
  data = _tokenize(str(path), tokenizer, progress=messages.append)
  assert data.sources["text"].documents("test") == 2
  assert messages == [
    f"warning: 2 pieces of bad input left out, the first {path}:2: field 'text'"
    " is int, expected text"
  ]


def test_a_path_that_leads_nowhere_is_named(tokenizer):
  with pytest.raises(errors.UserError) as error:
    _tokenize("/no/where", tokenizer)
  assert str(error.value) == (
    "--text.path='/no/where': there is no such file or folder"
  )


def test_paragraphs_and_other_fields_are_read_as_asked(kit, tokenizer):
  (kit.folder / "a.txt").write_text("one\n\ntwo\n\nthree\n")
  source = SourceConfig(path=str(kit.folder / "a.txt"), language="zh")
  for documents, expected in (("file", 1), ("paragraph", 3)):
    data = raw_text.tokenize(
      dataclasses.replace(source, txt_documents=documents),
      tokenizer=tokenizer,
      field="--text",
      progress=_refuse,
    )
    assert data.sources["text"].documents("test") == expected
    assert data.languages == ("zh",)
