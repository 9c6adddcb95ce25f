"""The decoder: from tokens to logits. One model for dense and MoE.

tokens -> Embedding -> L x Block -> RMSNorm -> LM head -> logits
Block: x + Attention(RMSNorm(x)), then x + FFN or MoE(RMSNorm(x))

Layers that are all alike are scanned; some with experts and others without, in
pieces: mixed_layers.py.

What a growth has added may count in part: growth_mask.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Float, Int

from aquila_jax.core import axes, dtypes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Leaf, Params, RoutingStats
from aquila_jax.layers import rotary, target_scores
from aquila_jax.layers.attention import Attention, KVCache
from aquila_jax.layers.embedding import Embedding, LMHead
from aquila_jax.layers.feed_forward import FeedForward
from aquila_jax.layers.moe import router
from aquila_jax.layers.moe.layer import MoeFeedForward
from aquila_jax.layers.norm import RMSNorm
from aquila_jax.layers.target_scores import TargetScores
from aquila_jax.models import growth_mask, layer_runs
from aquila_jax.models.growth_mask import NO_MASKS, Masks
from aquila_jax.models.mixed_layers import mixed_layers
from aquila_jax.sharding import sequence
from aquila_jax.sharding.rules import constrained


class DecoderOutput(struct.PyTreeNode):
  """What the decoder answers."""

  # float [B T V]; at least float32. None where targets are given.
  logits: Leaf | None
  # Stacked over the layers with experts (config.moe_layers); None when dense.
  routing: RoutingStats | None
  # As the one that was given; None when none was.
  cache: KVCache | ListedCache | None
  scores: TargetScores | None = None  # None where no targets are given


class ListedCache(struct.PyTreeNode):
  """A `KVCache` of all layers, for a decoder whose layers stand in a list.

  Every layer has arrays of its own, which are grown in place. What is the same
  in all layers is here once.
  """

  key: tuple[Leaf, ...]  # of every layer, float [B K S H]
  value: tuple[Leaf, ...]  # of every layer, float [B K S H]
  segments: Leaf  # int [B S]
  length: Leaf  # int []


def _norm(config: ModelConfig, name: str, *, reads: bool = False) -> RMSNorm:
  return RMSNorm(
    epsilon=config.norm_epsilon,
    scale_axis=axes.reads("embed") if reads else axes.writes("embed"),
    param_dtype=jnp.dtype(config.param_dtype),
    name=name,
  )


def final_norm(config: ModelConfig) -> RMSNorm:
  """In front of the LM head; of a tied one it reads what the head reads."""
  return _norm(config, "final_norm", reads=config.tied_embeddings)


class Block(nn.Module):
  """One layer: pre-norm attention and pre-norm feed-forward.

  Attributes:
    config: of the decoder.
    has_experts: whether this layer is one of `config.moe_layers`; of no
      account where the decoder has none.
    token_parts: devices over which the tokens of a row lie, by
      core/token_order.py.
  """

  config: ModelConfig
  has_experts: bool = True
  token_parts: int = 1

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    cache: KVCache | None,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    share: Float[Array, ""] | None = None,
    masks: Masks = NO_MASKS,
    groups: Float[Array, "B T I"] | None = None,
  ) -> tuple[Float[Array, "B T D"], tuple[RoutingStats | None, KVCache | None]]:
    """`share` is how much the layer counts, this one's of `masks.layers`."""
    x, normed, cache = _first_half(
      self.config,
      x,
      cache,
      tables,
      segments,
      share,
      masks,
      token_parts=self.token_parts,
    )
    if self.config.moe is None or not self.has_experts:
      # A stack of both kinds has each under a name of its own.
      uniform = self.config.moe is None
      name = layer_runs.EXPERTS if uniform else layer_runs.DENSE
      out = FeedForward(self.config, name=name)(normed, mask=masks.mlp)
      return add(x, out, share), (None, cache)
    out, stats = MoeFeedForward(
      self.config, token_parts=self.token_parts, name="mlp"
    )(normed, segments=segments, mask=masks.mlp, groups=groups)
    return add(x, out, share), (stats, cache)


class FirstHalf(nn.Module):
  """What a `Block` does before its FFN, with the same names of parameters."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    share: Float[Array, ""] | None = None,
    masks: Masks = NO_MASKS,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The residual, and what the FFN reads of it."""
    tables = rotary.tables_of(self.config, positions)
    x, normed, _ = _first_half(
      self.config, x, None, tables, segments, share, masks
    )
    return x, normed


def _first_half(
  config, x, cache, tables, segments, share, masks, *, token_parts=1
):
  """Attention and both norms; a part of the module that calls it."""
  attended, cache = Attention(
    config, token_parts=token_parts, name="attention"
  )(
    _norm(config, "attention_norm")(x, masks.embed),
    tables=tables,
    segments=segments,
    cache=cache,
    head_mask=masks.heads,
  )
  x = add(x, attended, share)
  return x, _norm(config, "mlp_norm")(x, masks.embed), cache


def add(
  x: Float[Array, "B T D"],
  out: Float[Array, "B T D"],
  share: Float[Array, ""] | None,
) -> Float[Array, "B T D"]:
  """The residual and a layer's output, which counts by `share`.

  Added in float32, which rounds to the same numbers: by its compiler's estimate
  v6e takes longer for a sum of bfloat16 that nothing is fused with.
  """
  out = out if share is None else out * share.astype(out.dtype)
  wide = dtypes.at_least_float32(x.dtype)
  total = (x.astype(wide) + out.astype(wide)).astype(x.dtype)
  return constrained(total, "row", "token", "embed")


_REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class DecoderLM(nn.Module):
  """A decoder language model over packed rows of documents.

  Attributes:
    config: the architecture.
    listed: the layers follow each other in a list, with parameters of
      `list_layers`, instead of in a scan over stacked ones. A scan is compiled
      in the time of one layer, but copies each layer's parameters out of the
      stack: nothing beside the work on many tokens, much beside that on one.
    only_shapes: nobody asks for the numbers that `init` draws.
  """

  config: ModelConfig
  listed: bool = False
  only_shapes: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    cache: KVCache | ListedCache | None = None,
    last_only: bool = False,
    mask_value: Float[Array, ""] | float | None = None,
    groups: Float[Array, "B T I"] | None = None,
    targets: Int[Array, "B T"] | None = None,
  ) -> DecoderOutput:
    """Logits of the next token, for every token.

    Args:
      tokens: token ids below V.
      positions: from 0 in every document.
      segments: documents of a row, from 1; 0 is padding.
      cache: of `make_cache`, to go on from; T new tokens are appended. Of
        `list_cache` where the layers are listed.
      last_only: logits of the last token only, [B 1 V]; those of all tokens
        of a long prompt may be larger than the model.
      mask_value: in place of `config.growth_mask.value`; it may be traced.
      groups: 1 where a token is of group i (a language); experts' load is
        counted of each as well.
      targets: ids below V; what the logits say of them is answered in the place
        of the logits.

    Returns:
      Logits or scores, the routing of every layer, and the grown cache.

    Raises:
      ValueError: on a mask_value for a model without a growth mask.
    """
    config = self.config
    masks = growth_mask.make_masks(config, mask_value)
    embedding = Embedding(config, name="embedding")
    parts = 1 if cache is not None else sequence.token_parts(tokens.shape[1])
    if parts > 1:
      given = (tokens, positions, segments, groups)
      given = jax.tree.map(sequence.dealt, given)
      tokens, positions, segments, groups = given
    x = constrained(embedding(tokens), "row", "token", "embed")
    scan = self._scan_mixed if config.is_mixed else self._scan
    layers: Any = self._list if self.listed else scan
    x, routing, cache = layers(
      x,
      cache,
      # Once for all layers, whose backward pass would compute them again.
      tables=rotary.tables_of(config, positions),
      segments=segments,
      masks=masks,
      groups=groups,
      token_parts=parts,
    )
    if parts > 1:
      x = sequence.in_row_order(x)
    if last_only:
      x = x[:, -1:]
    x = final_norm(config)(x, masks.embed)
    routing = growth_mask.weigh_losses(routing, config, masks)
    logits, scores = self._head(embedding, x, targets)
    return DecoderOutput(
      logits=logits, routing=routing, cache=cache, scores=scores
    )

  def _head(
    self,
    embedding: Embedding,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"] | None,
  ) -> tuple[Float[Array, "B T V"] | None, TargetScores | None]:
    """Logits, or what they say of targets."""
    config = self.config
    head: Any = None
    if not config.tied_embeddings:
      head = LMHead(config, name="lm_head")
    if targets is not None and config.head_chunks > 1:
      kernel = (embedding if head is None else head).head(x.dtype)
      return None, target_scores.in_chunks(
        x, kernel, targets, num_chunks=config.head_chunks
      )
    logits = embedding.attend(x) if head is None else head(x)
    logits = constrained(logits, "row", "token", "vocab")
    if targets is None:
      return logits, None
    return None, target_scores.of_logits(logits, targets)

  def _scan(
    self,
    x: Float[Array, "B T D"],
    cache: KVCache | None,
    *,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    masks: Masks,
    groups: Float[Array, "B T I"] | None,
    token_parts: int,
  ) -> tuple[Float[Array, "B T D"], RoutingStats | None, KVCache | None]:
    layers = nn.scan(
      self._block(),
      # The outputs of the layers, where `apply` is asked to capture them.
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True, router.RNG: True},
      # Flax declares no type; pyright takes that of the default, an int.
      in_axes=(0, *2 * (nn.broadcast,), 0, *2 * (nn.broadcast,)),  # pyright: ignore[reportArgumentType]
      out_axes=0,
      length=self.config.num_layers,
      unroll=1 if self.config.scan_layers else self.config.num_layers,
      metadata_params={nn.meta.PARTITION_NAME: "layer"},
      check_constancy_invariants=self._draws(),
    )(self.config, token_parts=token_parts, name="layers")
    x, (routing, cache) = layers(
      x, cache, tables, segments, masks.layers, masks, groups
    )
    return x, routing, cache

  def _scan_mixed(
    self,
    x: Float[Array, "B T D"],
    cache: KVCache | None,
    *,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    masks: Masks,
    groups: Float[Array, "B T I"] | None,
    token_parts: int,
  ) -> tuple[Float[Array, "B T D"], RoutingStats, KVCache | None]:
    layers: Any = mixed_layers(
      self.config,
      self._block(),
      token_parts=token_parts,
      initializing=self.is_initializing(),
      draws=self._draws(),
    )
    return layers(x, cache, tables, segments, masks, groups)

  def _list(
    self,
    x: Float[Array, "B T D"],
    cache: ListedCache | None,
    *,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    masks: Masks,
    groups: Float[Array, "B T I"] | None,
    token_parts: int,
  ) -> tuple[Float[Array, "B T D"], RoutingStats | None, ListedCache | None]:
    block = self._block()
    routings, caches = [], []
    for i in range(self.config.num_layers):
      one = None if cache is None else _cache_of(cache, i)
      share = None if masks.layers is None else masks.layers[i]
      layer = block(
        self.config,
        has_experts=i in self.config.moe_layers,
        token_parts=token_parts,
        name=_layer_name(i),
      )
      x, (routing, one) = layer(x, one, tables, segments, share, masks, groups)
      if routing is not None:
        routings.append(routing)
      caches.append(one)
    routing = None
    if routings:
      routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
    if cache is None:
      return x, routing, None
    grown = caches[0].replace(
      key=tuple(one.key for one in caches),
      value=tuple(one.value for one in caches),
    )
    return x, routing, ListedCache(**vars(grown))

  def _draws(self) -> bool:
    """Whether layers draw numbers that are used.

    Flax's scan by default traces a layer a first time to see what is constant,
    and nothing is; but the numbers of a seed are those of the second trace.
    """
    has_rng = self.has_rng("params") or self.has_rng(router.RNG)
    return has_rng and not self.only_shapes

  def _block(self) -> Any:
    if self.config.remat == "none":
      return Block
    return nn.remat(
      Block, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=False
    )


def _layer_name(index: int) -> str:
  return f"layer_{index}"


def _cache_of(cache: ListedCache, index: int) -> KVCache:
  return KVCache(
    key=cache.key[index],
    value=cache.value[index],
    segments=cache.segments,
    length=cache.length,
  )


def list_layers(
  params: Params,
  config: ModelConfig,
  *,
  split: Callable[[Any], Sequence[Any]] = tuple,
) -> Params:
  """The parameters for `listed` layers, out of stacked ones.

  Args:
    params: of the scanned decoder.
    config: of the decoder.
    split: takes a stacked leaf apart, into one for each of its rows.

  Returns:
    The same parameters; each layer's under a name of its own.
  """
  listed = {name: leaf for name, leaf in params.items() if name != "layers"}
  rows = jax.tree.map(split, params["layers"])
  for layer in range(config.num_layers):
    listed[_layer_name(layer)] = _layer_of(rows, config, layer)
  return listed


def layer_params(params: Params, config: ModelConfig, layer: int) -> Params:
  """The parameters of one layer, for a `Block`.

  Args:
    params: of the scanned decoder.
    config: of the decoder.
    layer: its number, from 0.

  Returns:
    A tree without the leaves that only other layers have.
  """
  return _layer_of(params["layers"], config, layer)


def _layer_of(stack: Params, config: ModelConfig, layer: int) -> Params:
  """Of leaves, or lists of their rows, the row of a layer."""
  declared: Any = traverse_util.flatten_dict(parameter_axes(config)["layers"])
  leaves: Any = traverse_util.flatten_dict(stack)
  rows = {keys: axes.row_of(layer) for keys, axes in declared.items()}
  return traverse_util.unflatten_dict(
    {keys: leaves[keys][row] for keys, row in rows.items() if row is not None}
  )


def list_cache(cache: KVCache) -> ListedCache:
  """The cache for `listed` layers, out of a stacked one."""
  return ListedCache(
    key=tuple(cache.key),
    value=tuple(cache.value),
    segments=cache.segments[0],
    length=cache.length[0],
  )


def make_cache(
  config: ModelConfig, *, batch_size: int, num_slots: int
) -> KVCache:
  """An empty cache of `num_slots` tokens a row, stacked over the layers."""
  shape = (
    config.num_layers,
    batch_size,
    config.num_kv_heads,
    num_slots,
    config.head_dim,
  )
  dtype = jnp.dtype(config.compute_dtype)
  return KVCache(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    segments=jnp.zeros((config.num_layers, batch_size, num_slots), jnp.int32),
    length=jnp.zeros(config.num_layers, jnp.int32),
  )


def _init_declared(
  config: ModelConfig, key: jax.Array, *, only_shapes: bool = False
) -> Any:
  row = jnp.ones((1, 2), jnp.int32)
  model = DecoderLM(config, only_shapes=only_shapes)
  variables = model.init(key, row, positions=row, segments=row)
  return variables["params"]


def init_params(config: ModelConfig, *, key: jax.Array) -> Params:
  """Random parameters: plain nested dicts of arrays."""
  return _init(config, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(config: ModelConfig, key: jax.Array) -> Params:
  return axes.split_declared(_init_declared(config, key))[0]


@functools.cache
def _abstract(config: ModelConfig) -> tuple[Any, Any]:
  boxed = jax.eval_shape(
    functools.partial(_init_declared, config, only_shapes=True),
    jax.random.key(0),
  )
  return axes.split_declared(boxed)


def abstract_params(config: ModelConfig) -> Params:
  """The parameters' shapes and dtypes, without allocating any."""
  return _abstract(config)[0]


def parameter_axes(config: ModelConfig) -> Any:
  """The declared `LeafAxes` of every parameter, in the same structure."""
  return _abstract(config)[1]


def as_declared(params: Params, config: ModelConfig) -> Params:
  """Parameters in the dtypes that an architecture declares.

  Args:
    params: in its shapes, in any dtype.
    config: the architecture.

  Returns:
    The same values.
  """

  def cast(leaf, declared):
    assert leaf.shape == declared.shape, (leaf.shape, declared.shape)
    return leaf.astype(declared.dtype)

  return jax.tree.map(cast, params, abstract_params(config))
