"""Causal grouped-query attention over packed documents."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import axes, dtypes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Leaf
from aquila_jax.kernels.attention import api
from aquila_jax.kernels.attention.mesh_axes import MeshAxes
from aquila_jax.kernels.attention.reference import attend, causal_mask
from aquila_jax.layers import rotary
from aquila_jax.layers.norm import RMSNorm
from aquila_jax.sharding.rules import COMPUTE, constrained

# What the compiler cannot divide is told how heads lie.
_MESH_AXES = MeshAxes(rows=COMPUTE["row"], kv_heads=COMPUTE["kv_head"])
_DIVIDED_TOKENS = dataclasses.replace(_MESH_AXES, tokens=COMPUTE["token"])


class KVCache(struct.PyTreeNode):
  """Keys and values of the tokens seen so far, one layer or a stack of them.

  Slots are filled in order of arrival; `segments` is 0 where a slot is empty.
  """

  key: Leaf  # float [*L B K S H]
  value: Leaf  # float [*L B K S H]
  segments: Leaf  # int [*L B S]
  length: Leaf  # int [*L]; slots filled


def attend_to_cache(
  query: Float[Array, "B T K G H"],
  key: Float[Array, "B K S H"],
  value: Float[Array, "B K S H"],
  *,
  mask: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
  """`attend`, to keys and values as a cache has them.

  One query a row, the step of a generation, is a product of its own. With
  these operands and without T among their axes XLA:CPU reads the cache where
  it lies; otherwise it copies it transposed in every step, and the output
  kernel too. For 8 rows of 160 slots, on 2 cores, 30 layers of attention alone
  so take 6 ms a step instead of 14, in the shapes of SmolLM2-135M.
  """
  if query.shape[1] > 1:
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return attend(query, key, value, mask=mask)
  scale = query.shape[-1] ** -0.5
  dtype = dtypes.at_least_float32(query.dtype)
  one = query[:, 0] * scale  # (B, 1, K, G, H) -> (B, K, G, H)
  logits = jnp.einsum("BKGH,BKSH->BKGS", one, key, preferred_element_type=dtype)
  logits = jnp.where(mask[:, None], logits, jnp.finfo(dtype).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum("BKGS,BKSH->BKGH", weights, value)[:, None]


class Attention(nn.Module):
  """Grouped-query attention (arXiv 2305.13245) with RoPE.

  Options: biases, RMSNorm of every query and key head in front of RoPE
  (`qk_norm`), and a sliding window.

  A query kernel is [D, K, G, H]: head growth inside the groups is plain growth
  of its `q_per_kv` axis.

  Attributes:
    config: of the decoder.
    token_parts: devices over which the tokens of a row lie, by
      core/token_order.py; a cache has them on one.
  """

  config: ModelConfig
  token_parts: int = 1

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    cache: KVCache | None = None,
    head_mask: Float[Array, "K G"] | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Attends to the row itself, or to the cache with the row appended.

    `tables` are those of the tokens' positions; `head_mask` says how much each
    head counts, None that all do in full.
    """
    config = self.config
    query = self._project("query", x, head_axes=("kv_head", "q_per_kv"))
    key = self._project("key", x, head_axes=("kv_head",))
    value = self._project("value", x, head_axes=("kv_head",))
    if config.qk_norm:
      query, key = self._norm("query", query), self._norm("key", key)
    query, key = rotary.rotate(query, tables), rotary.rotate(key, tables)
    if self.is_initializing():
      heads = query  # shapes are all that counts
    elif cache is None:
      heads = api.causal_attention(
        query,
        key,
        value,
        segments=segments,
        window=config.sliding_window,
        implementation=config.attention_implementation,
        mesh_axes=_DIVIDED_TOKENS if self.token_parts > 1 else _MESH_AXES,
      )
    else:
      assert self.token_parts == 1
      mask_offset = cache.length
      cache = _append(cache, key=key, value=value, segments=segments)
      mask = causal_mask(
        segments,
        cache.segments,
        offset=mask_offset,
        window=config.sliding_window,
      )
      heads = attend_to_cache(query, cache.key, cache.value, mask=mask)
    kernel = self._kernel("out", ("kv_head", "q_per_kv", "head_dim"), "embed")
    if head_mask is not None:
      kernel = kernel * head_mask.astype(kernel.dtype)[..., None, None]
    out = jnp.einsum("BTKGH,KGHD->BTD", heads, kernel.astype(x.dtype))
    if config.out_bias:
      out = out + self._bias("out", ("embed",)).astype(x.dtype)[None, None]
    return out, cache

  def _norm(
    self, name: str, heads: Float[Array, "B T *heads H"]
  ) -> Float[Array, "B T *heads H"]:
    return RMSNorm(
      epsilon=self.config.head_norm_epsilon,
      scale_axis=axes.writes("head_dim"),
      param_dtype=jnp.dtype(self.config.param_dtype),
      name=f"{name}_norm",
    )(heads)

  def _project(
    self, name: str, x: Float[Array, "B T D"], *, head_axes: tuple[str, ...]
  ) -> Float[Array, "B T *heads H"]:
    """X W (+ b) into the head axes and head_dim."""
    config = self.config
    sizes = [self._size(axis) for axis in (*head_axes, "head_dim")]
    written = [axes.writes(axis) for axis in (*head_axes, "head_dim")]
    kernel = self.param(
      f"{name}_kernel",
      axes.declare(
        nn.initializers.normal(config.init_std), [axes.reads("embed"), *written]
      ),
      (x.shape[-1], *sizes),
      jnp.dtype(config.param_dtype),
    )
    heads = jnp.tensordot(x, kernel.astype(x.dtype), axes=1)
    if config.qkv_bias:
      bias = self._bias(name, (*head_axes, "head_dim"))
      heads = heads + bias.astype(x.dtype)[None, None]
    return constrained(heads, "row", "token", *head_axes, "head_dim")

  def _bias(
    self, name: str, written: tuple[str, ...]
  ) -> Float[Array, "*written"]:
    return self.param(
      f"{name}_bias",
      axes.declare(nn.initializers.zeros, [axes.writes(a) for a in written]),
      tuple(self._size(axis) for axis in written),
      jnp.dtype(self.config.param_dtype),
    )

  def _kernel(
    self, name: str, read: tuple[str, ...], written: str
  ) -> Float[Array, "K G H D"]:
    config = self.config
    return self.param(
      f"{name}_kernel",
      axes.declare(
        nn.initializers.normal(config.init_std),
        [*map(axes.reads, read), axes.writes(written)],
      ),
      tuple(self._size(axis) for axis in (*read, written)),
      jnp.dtype(config.param_dtype),
    )

  def _size(self, axis: str) -> int:
    return {
      "embed": self.config.embed_dim,
      "kv_head": self.config.num_kv_heads,
      "q_per_kv": self.config.queries_per_kv,
      "head_dim": self.config.head_dim,
    }[axis]


def _append(
  cache: KVCache,
  *,
  key: Float[Array, "B T K H"],
  value: Float[Array, "B T K H"],
  segments: Int[Array, "B T"],
) -> KVCache:
  """Writes the row's keys and values into the next free slots."""
  zero = jnp.zeros((), cache.length.dtype)
  start = (zero, zero, cache.length, zero)

  def grown(slots: jax.Array, new: jax.Array) -> jax.Array:
    new = new.astype(slots.dtype).swapaxes(1, 2)  # (B, T, K, H) -> (B, K, T, H)
    return jax.lax.dynamic_update_slice(slots, new, start)

  return KVCache(
    key=grown(cache.key, key),
    value=grown(cache.value, value),
    segments=jax.lax.dynamic_update_slice(
      cache.segments, segments, (zero, cache.length)
    ),
    length=cache.length + segments.shape[1],
  )
