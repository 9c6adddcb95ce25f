"""Tiny models and a byte-level tokenizer of whole bytes."""

from __future__ import annotations

import functools
from typing import Any

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.generation.generate import TextModel
from aquila_jax.models import decoder_lm

END_OF_TEXT = 256


def byte_tokenizer() -> Tokenizer:
  """One token a byte, in the order of the byte-level alphabet, and <eot>."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {character: i for i, character in enumerate(alphabet)}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|endoftext|>"])
  assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT
  return tokenizer


def model_config(*, moe: bool, **fields) -> ModelConfig:
  """Two layers; 7 rows of the table have no token."""
  defaults: dict[str, Any] = dict(
    vocab_size=264,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    context_length=64,
    # Large, so that the logits differ by far more than rounding.
    init_std=0.4,
    compute_dtype="float32",
  )
  if moe:
    # A capacity that would drop most assignments, were it not ignored.
    defaults["moe"] = MoeConfig(
      num_experts=4, block_size=4, router_init_std=1.0, capacity_factor=0.25
    )
  return ModelConfig(**(defaults | fields))


@functools.cache
def text_model(moe: bool) -> TextModel:
  """A random model of `model_config`."""
  config = model_config(moe=moe)
  init = jax.jit(functools.partial(decoder_lm.init_params, config))
  params = init(key=jax.random.key(3))
  return TextModel(config=config, params=params, tokenizer=byte_tokenizer())
