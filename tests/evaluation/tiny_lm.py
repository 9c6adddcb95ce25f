"""A random model with a tokenizer, and what it writes, one row at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.models import decoder_lm
from tests.evaluation import tiny

CONFIG = ModelConfig(
  vocab_size=264,
  num_layers=1,
  embed_dim=16,
  mlp_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  context_length=64,
  init_std=0.5,
  compute_dtype="float32",
)


@functools.cache
def stored() -> StoredModel:
  """Its tokenizer begins every text with <|endoftext|>."""
  init = jax.jit(functools.partial(decoder_lm.init_params, CONFIG))
  return StoredModel(
    config=CONFIG,
    lineage=Lineage(),
    params=init(key=jax.random.key(3)),
    tokenizer=tiny.prepared(tiny.TEXTS).tokenizer_text,
  )


def tokenizer() -> Tokenizer:
  text = stored().tokenizer
  assert text is not None
  return Tokenizer.from_str(text)


@jax.jit
def _logits(params, row):
  out: Any = decoder_lm.DecoderLM(CONFIG).apply(
    {"params": params},
    row,
    positions=jnp.arange(row.shape[1])[None],
    segments=jnp.ones_like(row),
  )
  return out.logits


def logits(ids: list[int]) -> np.ndarray:
  """Of every token of a row that fits the context, float64 [T V]."""
  # One width, so one program; what is to the right has no influence.
  row = np.zeros((1, CONFIG.context_length), np.int32)
  row[0, : len(ids)] = ids
  found = np.asarray(_logits(stored().params, row), np.float64)
  return found[0, : len(ids)]


def log_prob(context: list[int], continuation: list[int]) -> float:
  """Of a continuation that fits the context with what is in front of it."""
  read = (context + continuation)[-CONFIG.context_length - 1 : -1]
  rows = logits(read)[-len(continuation) :]
  rows = rows - np.log(np.sum(np.exp(rows), axis=-1, keepdims=True))
  return sum(row[token] for row, token in zip(rows, continuation, strict=True))


def greedy(prompt: list[int], count: int) -> list[int]:
  """`count` tokens after a prompt, each the most probable with a text."""
  ids, known = list(prompt), tokenizer().get_vocab_size()
  for _ in range(count):
    ids.append(int(np.argmax(logits(ids)[-1, :known])))
  return ids[len(prompt) :]
