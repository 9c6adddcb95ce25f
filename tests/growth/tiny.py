"""Tiny stored models in float64, and what they compute."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.core.axes import path_name
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.core.types import Params
from aquila_jax.models import decoder_lm

# 3 query heads in each of 2 groups.
SOURCE = ModelConfig(
  vocab_size=13,
  num_layers=3,
  embed_dim=8,
  mlp_dim=10,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  context_length=12,
  rope_theta=100.0,
  param_dtype="float64",
  compute_dtype="float64",
)
MOE = MoeConfig(num_experts=4, top_k=2, block_size=4)
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


@functools.cache
def params(config: ModelConfig, *, seed: int = 0) -> Params:
  """Random everywhere: biases and norm scales are not special."""
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    is_scale = path_name(path).endswith("scale")
    drawn = 0.3 * generator.standard_normal(leaf.shape) + is_scale
    return jnp.asarray(drawn, leaf.dtype)

  return jax.tree_util.tree_map_with_path(
    draw, decoder_lm.abstract_params(config)
  )


def stored(config: ModelConfig, **fields) -> StoredModel:
  """A model with moments that are its gradient and the squares of it."""
  tree = params(config)
  defaults: dict[str, Any] = dict(
    config=config,
    lineage=Lineage(events=(Event(kind="scratch", name="dense"),)),
    params=tree,
    tokenizer="{}",
  )
  if "moments" not in fields:  # a gradient takes seconds to compile
    gradient = gradients(config, tree)
    defaults["moments"] = AdamMoments(
      count=jnp.asarray(7, jnp.int32),
      mu=gradient,
      nu=jax.tree.map(jnp.square, gradient),
    )
  return StoredModel(**(defaults | fields))


@functools.cache
def _apply(config: ModelConfig):
  model = decoder_lm.DecoderLM(config)
  tokens = jnp.asarray(TOKENS, jnp.int32)
  positions = jnp.arange(TOKENS.shape[1], dtype=jnp.int32)[None]
  segments = jnp.ones(TOKENS.shape, jnp.int32)

  @jax.jit
  def apply(tree):
    out: Any = model.apply(
      {"params": tree}, tokens, positions=positions, segments=segments
    )
    return out.logits

  return apply


def logits(config: ModelConfig, tree: Params) -> np.ndarray:
  """[T, V] of TOKENS."""
  return np.asarray(_apply(config)(tree)[0])


@functools.cache
def _gradient(config: ModelConfig):
  apply = _apply(config)

  @jax.jit
  def gradient(tree):
    def loss(tree):
      out = jax.nn.log_softmax(apply(tree)[0, :-1])
      targets = jnp.asarray(TOKENS[0, 1:])
      return -jnp.mean(jnp.take_along_axis(out, targets[:, None], axis=1))

    return jax.grad(loss)(tree)

  return gradient


def gradients(config: ModelConfig, tree: Params) -> Params:
  """Of the mean cross-entropy on TOKENS."""
  return _gradient(config)(tree)


def named(tree: Any) -> dict[str, Any]:
  """Leaves by their path."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_name(path): leaf for path, leaf in flat}


def arrays(tree: Any) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf) for name, leaf in named(tree).items()}


def replace(config: ModelConfig, **fields) -> ModelConfig:
  return dataclasses.replace(config, **fields)
