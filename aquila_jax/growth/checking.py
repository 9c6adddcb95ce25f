"""What a growth did to the function, measured on a text, a layer at a time.

Both models are read slice by slice as growth itself reads them, so that a model
can be checked that no memory holds, and before it is written anywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from aquila_jax.core import dtypes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth.exactness import Check
from aquila_jax.growth.grown_tree import LeafSpec, Tree, slices
from aquila_jax.growth.scale_up import model_leaves
from aquila_jax.growth.streamed_layers import StreamedLayers
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
  # Row by row: the logits of both are large enough. NaN stays NaN.
  differences = [
    np.abs(known[place] - before[place]).max()
    for place in np.ndindex(tokens.shape)
  ]
  return Check(
    tokens=tokens.size,
    largest_difference=float(np.max(differences)),
    largest_logit=float(max(before.max(), -before.min())),
    loss_before=_loss(before, tokens),
    loss_after=_loss(after, tokens),
  )


def _loss(values: np.ndarray, tokens: np.ndarray) -> float:
  """Mean nats of every token after the first."""
  total, rows = 0.0, values[:, :-1].reshape(-1, values.shape[-1])
  # One at a time: as float64 all would be twice as large as the logits.
  for row, target in zip(rows, tokens[:, 1:].reshape(-1), strict=True):
    row = row.astype(np.float64)
    largest = row.max()
    total += np.log(np.exp(row - largest).sum()) + largest - row[target]
  return float(total / len(rows))


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
  config, leaves = _wide(model.config), model_leaves(model.config)
  x = _run(model, Rows.of(tokens))
  scale = model.params.read(_NORM, index=(slice(None),))
  x = np.asarray(_normed(config, scale, x, make_masks(config)))
  return _head(model, leaves, x)


@functools.partial(jax.jit, static_argnums=0)
def _normed(config, scale, x, masks):
  norm: Any = decoder_lm.final_norm(config)
  return norm.apply({"params": {"scale": scale}}, x, masks.embed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Packed rows of text; see `types.Batch`."""

  tokens: Int[np.ndarray, "B T"]
  positions: Int[np.ndarray, "B T"]
  segments: Int[np.ndarray, "B T"]

  @classmethod
  def of(cls, tokens: Int[np.ndarray, "B T"]) -> Rows:
    """Rows that are one document each, and full."""
    places = np.arange(tokens.shape[1], dtype=np.int32)
    return cls(
      tokens=tokens,
      positions=np.broadcast_to(places, tokens.shape),
      segments=np.ones(tokens.shape, np.int32),
    )


# Of a layer's index and what its FFN reads, [B T D].
Watch = Callable[[int, Float[np.ndarray, "B T D"]], None]


def watch_ffn_inputs(model: ReadModel, rows: Rows, watch: Watch) -> None:
  """Runs a model's layers on a text, one in memory at a time.

  Args:
    model: dense or a mixture.
    rows: of the text.
    watch: told what the FFN of every layer reads, in order.
  """
  _run(model, rows, watch=watch)


def _wide(config: ModelConfig) -> ModelConfig:
  wide = np.dtype(dtypes.at_least_float32(jnp.dtype(config.param_dtype)))
  return dataclasses.replace(
    config,
    compute_dtype=wide.name,
    remat="none",
    attention_implementation=None,
  )


def _run(
  model: ReadModel, rows: Rows, *, watch: Watch | None = None
) -> Float[jax.Array, "B T D"]:
  """The residual behind the last layer."""
  config = _wide(model.config)
  leaves = model_leaves(config)
  wide = jnp.dtype(config.compute_dtype)
  x = jnp.asarray(_embedded(model.params, leaves, rows.tokens).astype(wide))
  layers = StreamedLayers(config, model.params, leaves)
  for number in range(config.num_layers):
    layer = layers.read(number)
    # Accelerators would take float32 as TF32 or bfloat16, and the difference
    # found would be theirs.
    with jax.default_matmul_precision("highest"):
      parts = [
        layer(x[part], rows.positions[part], rows.segments[part])
        for part in _parts(rows)
      ]
    x = jnp.concatenate([out for out, _ in parts])
    if watch is not None:
      watch(number, np.concatenate([np.asarray(seen) for _, seen in parts]))
  return x


# Tokens at once, where rows are not longer: what an FFN computes of them is as
# large as a few of its kernels.
_AT_ONCE = 1024


def _parts(rows: Rows) -> list[slice]:
  """Runs of rows, all of one length but for the last."""
  count, length = rows.tokens.shape
  step = max(1, _AT_ONCE // length)
  return [slice(start, start + step) for start in range(0, count, step)]


# The parts of a decoder outside of its layers (models/decoder_lm.py).
_TABLE, _NORM, _HEAD = "embedding.table", "final_norm.scale", "lm_head.kernel"


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
