"""What a growth did to the function, measured on a text, a layer at a time.

Both models are read slice by slice as growth itself reads them, so that a model
can be checked that no memory holds, and before it is written anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int

from aquila_jax.core import dtypes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth.exactness import Check
from aquila_jax.growth.grown_tree import LeafSpec, Tree, slices
from aquila_jax.growth.scale_up import model_leaves
from aquila_jax.models import decoder_lm
from aquila_jax.models.growth_mask import make_masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadModel:
  """A model that is read slice by slice."""

  config: ModelConfig
  params: Tree


def check(
  source: ReadModel, target: ReadModel, tokens: Int[np.ndarray, "B T"]
) -> Check:
  """Runs both models on the same rows.

  Args:
    source: before the growth.
    target: after it.
    tokens: rows of a text; T is at least 2.

  Returns:
    The largest difference of a logit, and the losses.
  """
  before, after = logits(source, tokens), logits(target, tokens)
  known = after[..., : source.config.vocab_size]
  return Check(
    tokens=tokens.size,
    largest_difference=float(np.abs(known - before).max()),
    largest_logit=float(np.abs(before).max()),
    loss_before=_loss(before, tokens),
    loss_after=_loss(after, tokens),
  )


def _loss(values: np.ndarray, tokens: np.ndarray) -> float:
  """Mean nats of every token after the first."""
  rows = values[:, :-1].astype(np.float64)
  largest = rows.max(-1, keepdims=True)
  log_sum = np.log(np.exp(rows - largest).sum(-1)) + largest[..., 0]
  chosen = np.take_along_axis(rows, tokens[:, 1:, None], axis=-1)[..., 0]
  return float((log_sum - chosen).mean())


def logits(
  model: ReadModel, tokens: Int[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T V"]:
  """The decoder's logits, with one layer of it in memory at a time.

  Args:
    model: dense or a mixture.
    tokens: ids below the vocabulary's size.

  Returns:
    The logits, in the dtype they are computed in.
  """
  wide = np.dtype(dtypes.at_least_float32(jnp.dtype(model.config.param_dtype)))
  config = dataclasses.replace(
    model.config, compute_dtype=wide.name, remat="none"
  )
  leaves = model_leaves(config)
  positions = jnp.broadcast_to(
    jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )
  segments = jnp.ones(tokens.shape, jnp.int32)

  masks = make_masks(config)

  @functools.partial(jax.jit, static_argnames="has_experts")
  def block(x, params, share, *, has_experts):
    out: Any = decoder_lm.Block(config, has_experts=has_experts).apply(
      {"params": params}, x, None, positions, segments, share, masks
    )
    return out[0]

  x = jnp.asarray(_embedded(model.params, leaves, tokens).astype(wide))
  for layer in range(config.num_layers):
    share = None if masks.layers is None else masks.layers[layer]
    params = _layer(model.params, leaves, layer)
    x = block(x, params, share, has_experts=layer in config.moe_layers)
  scale = model.params.read(_NORM, index=(slice(None),))
  norm: Any = decoder_lm.final_norm(config)
  x = np.asarray(norm.apply({"params": {"scale": scale}}, x, masks.embed))
  return _head(model, leaves, x)


# The parts of a decoder outside of its layers (models/decoder_lm.py).
_TABLE, _NORM, _HEAD = "embedding.table", "final_norm.scale", "lm_head.kernel"
_LAYERS = "layers"


def _embedded(
  tree: Tree, leaves: Mapping[str, LeafSpec], tokens: np.ndarray
) -> np.ndarray:
  """Rows of the table."""
  spec = leaves[_TABLE]
  x = np.empty((*tokens.shape, spec.shape[-1]), spec.dtype)
  for index in slices(spec):
    block: Any = index[0]
    here = (tokens >= block.start) & (tokens < block.stop)
    if here.any():
      rows = tree.read(_TABLE, index=index)
      x[here] = rows[tokens[here] - block.start]
  return x


def _layer(
  tree: Tree, leaves: Mapping[str, LeafSpec], layer: int
) -> dict[str, Any]:
  """The parameters of one layer."""
  arrays: dict[str, jax.Array] = {}
  for name, spec in leaves.items():
    folder, _, inside = name.partition(".")
    row = spec.axes.row_of(layer)
    if folder != _LAYERS or row is None:
      continue
    filled = np.empty(spec.shape[1:], spec.dtype)
    for index in slices(spec):
      if index[0] == row:
        filled[index[1:]] = tree.read(name, index=index)
    arrays[inside] = jnp.asarray(filled)
  return traverse_util.unflatten_dict(arrays, sep=".")


def _head(
  model: ReadModel, leaves: Mapping[str, LeafSpec], x: np.ndarray
) -> np.ndarray:
  """Logits, a block of the vocabulary at a time."""
  tied = model.config.tied_embeddings
  name = _TABLE if tied else _HEAD
  parts = []
  for index in slices(leaves[name]):
    part = model.params.read(name, index=index).astype(x.dtype)
    parts.append(x @ (part.T if tied else part))
  return np.concatenate(parts, axis=-1)
