from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from aquila_jax.core import errors
from aquila_jax.evaluation.text_codec import TextCodec
from aquila_jax.generation.generate import TextModel, text_model
from tests.evaluation import tiny_lm


def native(**fields) -> TextModel:
  return dataclasses.replace(text_model(tiny_lm.stored()), **fields)


def imported(**fields) -> TextModel:
  """With a tokenizer that puts nothing around a text."""
  letters = ["a", "b", "Ġ", "<|x|>", "<|y|>"]
  tokenizer = Tokenizer(
    models.BPE(vocab={name: i for i, name in enumerate(letters)}, merges=[])
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = ByteLevel()
  tokenizer.add_special_tokens(["<|x|>", "<|y|>"])
  return native(tokenizer=tokenizer, **fields)


def test_texts_begin_as_the_tokenizer_begins_them():
  codec = TextCodec(native())
  end = codec.prefix_token_id
  assert end == codec.eot_token_id == native().tokenizer.encode("").ids[0]
  plain = codec.encode("a stone", add_special_tokens=False)
  assert codec.encode("a stone") == [end, *plain]
  assert codec.encode("a stone", add_special_tokens=True) == [end, *plain]
  # It begins so already.
  assert codec.encode("<|endoftext|>a stone") == [end, *plain]
  without = TextCodec(native(), add_bos_token=False)
  assert without.encode("a stone") == plain
  assert codec.decode([end, *plain]) == "a stone"
  assert (
    codec.decode([end, *plain], skip_special_tokens=False)
    == "<|endoftext|>a stone"
  )


def test_an_imported_model_begins_with_its_stop_token_or_what_is_given():
  codec = TextCodec(imported(stop_tokens=(4, 3)))
  assert (codec.prefix_token_id, codec.eot_token_id) == (4, 4)
  assert codec.stop_tokens == (4, 3)
  assert codec.encode("ab") == [0, 1]
  # As harnesses do, what its makers call the beginning comes first.
  named = TextCodec(imported(stop_tokens=(4,), begin_token=3))
  assert (named.prefix_token_id, named.eot_token_id) == (3, 4)
  assert named.encode("ab") == [0, 1]
  chosen = TextCodec(imported(stop_tokens=(4,)), prefix_token_id=3)
  assert (chosen.prefix_token_id, chosen.eot_token_id) == (3, 4)
  assert chosen.encode("<|x|>ab") == [3, 0, 1]


@pytest.mark.parametrize(
  ("model", "options", "message"),
  [
    (
      imported(),
      {},
      "the MODEL's tokenizer.json names no token that begins or ends a text;"
      " give prefix_token_id",
    ),
    (
      native(),
      {"prefix_token_id": 264},
      "prefix_token_id=264: need 0 <= id < vocab_size=264",
    ),
  ],
)
def test_a_prefix_is_needed(model, options, message):
  with pytest.raises(errors.UserError) as raised:
    TextCodec(model, **options)
  assert str(raised.value) == message


def test_ids_without_a_row_are_refused():
  small = dataclasses.replace(tiny_lm.CONFIG, vocab_size=3)
  codec = TextCodec(imported(config=small), prefix_token_id=0)
  assert codec.encode("ab") == [0, 1]
  with pytest.raises(errors.UserError) as raised:
    codec.encode("ab<|x|>")
  assert str(raised.value) == (
    "the MODEL's tokenizer.json has the id 3; the model's vocab_size is 3"
  )
