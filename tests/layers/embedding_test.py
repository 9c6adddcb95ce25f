"""The table and the head, tied and untied."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.layers.embedding import Embedding, LMHead

CONFIG = ModelConfig(
  vocab_size=7,
  num_layers=1,
  embed_dim=4,
  mlp_dim=5,
  num_heads=1,
  num_kv_heads=1,
  head_dim=2,
)
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)), jnp.float32)
TOKENS = jnp.asarray([[0, 6, 3]])


def test_tokens_are_rows_of_the_table_in_the_compute_dtype():
  out: Any = Embedding(CONFIG).apply({"params": {"table": TABLE}}, TOKENS)
  assert out.dtype == jnp.bfloat16
  rows = [TABLE[0], TABLE[6], TABLE[3]]
  np.testing.assert_array_equal(
    np.asarray(out[0]), np.asarray(jnp.stack(rows).astype(jnp.bfloat16))
  )


def test_tied_head_is_the_table_transposed():
  config = dataclasses.replace(CONFIG, compute_dtype="float32")
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 4)), jnp.float32)
  tied: Any = Embedding(config).apply(
    {"params": {"table": TABLE}}, x, method=Embedding.attend
  )
  untied: Any = LMHead(config).apply({"params": {"kernel": TABLE.T}}, x)
  expected = np.asarray(x, np.float64) @ np.asarray(TABLE.T, np.float64)
  # Sums of 4 products: 4 roundings of numbers below 8.
  for logits in (tied, untied):
    np.testing.assert_allclose(logits, expected, atol=8 * 4 * 2**-24)


def test_logits_of_half_precision_are_float32():
  x = jnp.ones((1, 1, 4), jnp.bfloat16)
  # Near 4 bfloat16 has steps of 2^-5; the sum below keeps a 2^-7.
  kernel = jnp.ones((4, 7)).at[0].set(1 + 2**-7)
  logits: Any = LMHead(CONFIG).apply({"params": {"kernel": kernel}}, x)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits, np.full((1, 1, 7), 4 + 2**-7))


def test_axes_are_declared_with_their_direction():
  _, table = axes.split_declared(
    jax.eval_shape(Embedding(CONFIG).init, jax.random.key(0), TOKENS)
  )
  _, kernel = axes.split_declared(
    jax.eval_shape(LMHead(CONFIG).init, jax.random.key(0), jnp.ones((1, 1, 4)))
  )
  assert str(table["params"]["table"]) == "neither vocab, writes embed"
  assert str(kernel["params"]["kernel"]) == "reads embed, writes vocab"
