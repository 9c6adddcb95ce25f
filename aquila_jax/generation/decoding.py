"""The programs of generation: prefill, one step, and the loop over steps.

Prompts of different lengths end in the same slot: they stand to the right of
padding, which is segment 0 and so is neither attended to nor routed. All rows
then append to the cache at one place.

  slot      0 1 2 3 | 4 5 6
  row 0     . . a b | c d e      position of a: 0
  row 1     p q r s | t u v      position of p: 0
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Leaf, Params
from aquila_jax.generation import sampling
from aquila_jax.layers.attention import KVCache
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import check_causal
from aquila_jax.models.decoder_lm import DecoderLM, ListedCache

Cache = TypeVar("Cache", bound=KVCache | ListedCache)


class Decoding(struct.PyTreeNode):
  """Where a generation stands after `count` tokens."""

  cache: KVCache | ListedCache  # as the parameters of the steps are
  tokens: Leaf  # int [B N]; N is a bound on the new tokens
  count: Leaf  # int []; of the columns of `tokens` that are filled
  lengths: Leaf  # int [B]; tokens of the prompts
  finished: Leaf  # bool [B]; the row has chosen a stop token


def inference_config(
  config: ModelConfig, *, num_tokens: int = 0
) -> ModelConfig:
  """`config` without what only training wants: capacity, remat, unrolling.

  A capacity would drop tokens by what else is in the batch, so inference is
  dropless whatever the model was trained with.

  Args:
    config: of the model.
    num_tokens: M of a call with few tokens; 0 is many. Blocks of the dispatch
      are then no larger than an expert's mean share of the rows.

  Returns:
    A configuration with the same parameters.
  """
  moe = config.moe
  if moe is not None:
    block = moe.block_size
    if num_tokens:
      share = num_tokens * moe.top_k // moe.num_experts
      block = min(block, max(share, 1))
    moe = dataclasses.replace(moe, capacity_factor=None, block_size=block)
  return dataclasses.replace(config, moe=moe, remat="none", scan_layers=True)


def append(
  config: ModelConfig,
  params: Params,
  tokens: Int[Array, "B T"],
  *,
  positions: Int[Array, "B T"],
  segments: Int[Array, "B T"],
  cache: Cache,
) -> tuple[Float[Array, "B V"], Cache]:
  """Reads T more tokens of every row.

  Args:
    config: of `inference_config`.
    params: of the model; of `step_params` where the cache is listed.
    tokens: to append to the cache.
    positions: from 0 in every row.
    segments: 0 for padding and 1 for text.
    cache: what was read before.

  Returns:
    The logits after the last token, and the grown cache.

  Raises:
    errors.UserError: on a model that is not causal.
  """
  check_causal(config)
  listed = isinstance(cache, ListedCache)
  out: Any = DecoderLM(config, listed=listed).apply(
    {"params": params},
    tokens,
    positions=positions,
    segments=segments,
    cache=cache,
    last_only=True,
  )
  return out.logits[:, -1], out.cache


def prefill(
  config: ModelConfig,
  params: Params,
  prompts: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  *,
  chooser: sampling.Chooser,
  stop_tokens: Int[Array, "stops"],
  max_new_tokens: int,
  listed: bool = False,
) -> Decoding:
  """Reads the prompts and chooses the first token.

  Args:
    config: of the model.
    params: of the model.
    prompts: each ends in the last column; what is before it is padding.
    lengths: tokens of each prompt, at least 1.
    chooser: of `sampling.make_chooser`.
    stop_tokens: each ends a row; -1 is none.
    max_new_tokens: N, the room for new tokens.
    listed: gives the cache for the listed parameters of `step_params`.

  Returns:
    The state after one new token.
  """
  batch_size, num_slots = prompts.shape
  positions = jnp.arange(num_slots)[None] - (num_slots - lengths)[:, None]
  cache = decoder_lm.make_cache(
    config, batch_size=batch_size, num_slots=num_slots + max_new_tokens
  )
  logits, cache = append(
    inference_config(config),
    params,
    prompts,
    positions=jnp.maximum(positions, 0),
    segments=(positions >= 0).astype(jnp.int32),
    cache=cache,
  )
  count = jnp.zeros((), jnp.int32)
  first = sampling.choose(logits, chooser, step=count)
  tokens = jnp.zeros((batch_size, max_new_tokens), jnp.int32)
  return Decoding(
    cache=decoder_lm.list_cache(cache) if listed else cache,
    tokens=tokens.at[:, 0].set(first),
    count=count + 1,
    lengths=lengths,
    finished=_among(first, stop_tokens),
  )


def advance(
  config: ModelConfig,
  params: Params,
  state: Decoding,
  *,
  chooser: sampling.Chooser,
  stop_tokens: Int[Array, "stops"],
) -> Decoding:
  """Reads the last token of every row and chooses the next.

  A finished row becomes padding: its further tokens have no meaning.
  """
  last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
  logits, cache = append(
    inference_config(config, num_tokens=last.shape[0]),
    params,
    last,
    positions=(state.lengths + state.count - 1)[:, None],
    segments=(~state.finished).astype(jnp.int32)[:, None],
    cache=state.cache,
  )
  chosen = sampling.choose(logits, chooser, step=state.count)
  tokens = jax.lax.dynamic_update_slice_in_dim(
    state.tokens, chosen[:, None], state.count, axis=1
  )
  return state.replace(
    cache=cache,
    tokens=tokens,
    count=state.count + 1,
    finished=state.finished | _among(chosen, stop_tokens),
  )


def _among(
  tokens: Int[Array, "B"], stop_tokens: Int[Array, "stops"]
) -> Bool[Array, "B"]:
  return jnp.any(tokens[:, None] == stop_tokens[None], axis=-1)


def advance_all(
  config: ModelConfig,
  params: Params,
  state: Decoding,
  *,
  chooser: sampling.Chooser,
  stop_tokens: Int[Array, "stops"],
  limit: Int[Array, ""],
) -> Decoding:
  """`advance` until every row has stopped or has `limit` tokens."""

  def goes_on(state):
    return (state.count < limit) & ~jnp.all(state.finished)

  def one_step(state):
    return advance(
      config, params, state, chooser=chooser, stop_tokens=stop_tokens
    )

  return jax.lax.while_loop(goes_on, one_step, state)


# One program for each shape. A text that is shown as it grows takes the steps
# one by one.
prefill_once = jax.jit(
  prefill, static_argnames=("config", "max_new_tokens", "listed")
)
advance_once = jax.jit(
  advance, static_argnames="config", donate_argnames="state"
)
advance_to_end = jax.jit(
  advance_all, static_argnames="config", donate_argnames="state"
)


def step_params(params: Params, config: ModelConfig) -> Params:
  """The parameters as `advance` reads them fastest; no second copy of them.

  On a CPU that is each layer's by itself: see `DecoderLM.listed`. They are
  views of the stacked ones, which must stay as they are meanwhile. Elsewhere,
  or spread over devices, they are what was given.

  Args:
    params: of the model.
    config: of the model.

  Returns:
    The parameters for `advance`; `is_listed` tells which.
  """
  leaves = jax.tree.leaves(params)
  if not all(isinstance(leaf, jax.Array) for leaf in leaves):
    return params
  devices = {device for leaf in leaves for device in leaf.devices()}
  if len(devices) != 1 or devices.pop().platform != "cpu":
    return params
  return decoder_lm.list_layers(params, config, split=_views)


def mesh_of(params: Params) -> contextlib.AbstractContextManager[Any]:
  """The context in which programs of these parameters are traced.

  What the compiler cannot divide over several devices divides itself by it.
  """
  for leaf in jax.tree.leaves(params):
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
      return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
  return contextlib.nullcontext()


def is_listed(params: Params) -> bool:
  """Whether parameters are listed, or stacked as the model has them."""
  return "layers" not in params


def _views(stack: jax.Array) -> list[jax.Array]:
  # Committed to a device like the stack or not: the steps' results are then
  # like their arguments, and no second program is compiled for them.
  place = stack.sharding if stack.committed else None
  return [
    jax.device_put(layer, place, may_alias=True) for layer in np.asarray(stack)
  ]
