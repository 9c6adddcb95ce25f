"""The layers of a decoder of which some have experts and others a dense FFN.

They are scanned run by run (layer_runs.py): a scan needs layers that are alike.
Outside, the parameters are as the stack has them,

  attention, attention_norm, mlp_norm   of all layers
  mlp                                   of the layers with experts
  dense_mlp                             of the others, with a width of its own

and what `apply` is asked to capture lies by run and block, as it is computed:
intermediates/layers/run_0/block_1/mlp is of the layers 1, 3, 5, ... of a stack
in which every second layer has experts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core.axes import Declared
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import RoutingStats
from aquila_jax.layers import rotary
from aquila_jax.layers.attention import KVCache
from aquila_jax.layers.moe import router
from aquila_jax.models import layer_runs
from aquila_jax.models.growth_mask import Masks
from aquila_jax.models.layer_runs import DENSE, EXPERTS, Run


def mixed_layers(
  config: ModelConfig,
  block: Any,
  *,
  token_parts: int,
  initializing: bool,
  draws: bool,
) -> nn.Module:
  """The module, named `layers`, with the parameters of the stack.

  Args:
    config: of the decoder.
    block: the class of a layer.
    token_parts: see decoder_lm.Block.
    initializing: whether parameters are made.
    draws: whether layers draw numbers that are used.

  Returns:
    A module to call as `_MixedLayers`.
  """
  runs = _runs(config)
  mapped: Any = nn.map_variables(
    _MixedLayers,
    "params",
    trans_in_fn=lambda group: _on_params(layer_runs.split, group, runs),
    trans_out_fn=lambda group: _declare(
      _on_params(layer_runs.join, group, runs), config
    ),
    init=initializing,
  )
  return mapped(config, block, token_parts, draws, name="layers")


def stack_captured(captured: Any, config: ModelConfig) -> Any:
  """What `apply` captured of the layers, stacked as parameters are.

  Args:
    captured: `intermediates/layers` of a decoder, mixed or not.
    config: of the decoder.

  Returns:
    By part of a layer, trees of leaves [layers with that part, ...], from the
    bottom up.
  """
  if not config.is_mixed:
    return captured
  return layer_runs.join(captured, _runs(config))


def _runs(config: ModelConfig) -> tuple[Run, ...]:
  return layer_runs.find_runs(
    tuple(i in config.moe_layers for i in range(config.num_layers))
  )


def _on_params(function: Any, group: Any, runs: Sequence[Run]) -> Any:
  return {name: function(tree, runs) for name, tree in group.items()}


def _declare(group: Any, config: ModelConfig) -> Any:
  """Says of the leaves that some layers have, which."""
  dense = set(range(config.num_layers)) - set(config.moe_layers)
  layers = {EXPERTS: config.moe_layers, DENSE: tuple(sorted(dense))}

  def declare(part: str, tree: Any) -> Any:
    if part not in layers:
      return tree
    return jax.tree.map(
      lambda box: box.replace(layers=layers[part]),
      tree,
      is_leaf=lambda node: isinstance(node, Declared),
    )

  return {
    name: {part: declare(part, tree) for part, tree in stack.items()}
    for name, stack in group.items()
  }


class _MixedLayers(nn.Module):
  """All runs, from the bottom up; with parameters by run and block."""

  config: ModelConfig
  block: Any
  token_parts: int
  draws: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    cache: KVCache | None,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    masks: Masks,
    groups: Float[Array, "B T I"] | None,
  ) -> tuple[Float[Array, "B T D"], RoutingStats, KVCache | None]:
    """Gives the routing of the layers with experts, and the cache of all."""
    start, routings, caches = 0, [], []
    for r, run in enumerate(_runs(self.config)):
      stop = start + len(run.kinds) * run.repeats
      # Rows of all layers -> (repeats, layers of the block, ...)
      rows = functools.partial(_rows, start=start, stop=stop, run=run)
      scanned: Any = nn.scan(
        _RunOfBlocks,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, router.RNG: True},
        # As in decoder_lm.py.
        in_axes=(0, *2 * (nn.broadcast,), 0, *2 * (nn.broadcast,)),  # pyright: ignore[reportArgumentType]
        out_axes=0,
        length=run.repeats,
        unroll=1 if self.config.scan_layers else run.repeats,
        metadata_params={nn.meta.PARTITION_NAME: "layer"},
        check_constancy_invariants=self.draws,
      )(
        self.config,
        self.block,
        run.kinds,
        self.token_parts,
        name=layer_runs.run_name(r),
      )
      x, (routing, grown) = scanned(
        x, rows(cache), tables, segments, rows(masks.layers), masks, groups
      )
      routings.append(_flat(routing))
      caches.append(_flat(grown))
      start = stop
    routing, cache = (_combined(jnp.concatenate, t) for t in (routings, caches))
    return x, routing, cache


class _RunOfBlocks(nn.Module):
  """The layers of one block of a run."""

  config: ModelConfig
  block: Any
  kinds: tuple[bool, ...]
  token_parts: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    caches: KVCache | None,
    tables: rotary.Tables,
    segments: Int[Array, "B T"],
    shares: Float[Array, "layers"] | None,
    masks: Masks,
    groups: Float[Array, "B T I"] | None,
  ) -> tuple[Float[Array, "B T D"], tuple[RoutingStats | None, KVCache | None]]:
    """What is stacked is so over the block's layers, the routing of experts."""
    routings, grown = [], []
    for i, has_experts in enumerate(self.kinds):
      layer = self.block(
        self.config,
        has_experts=has_experts,
        token_parts=self.token_parts,
        name=layer_runs.block_name(i),
      )
      cache, share = jax.tree.map(lambda leaf, i=i: leaf[i], (caches, shares))
      x, (routing, cache) = layer(
        x, cache, tables, segments, share, masks, groups
      )
      routings.append(routing)
      grown.append(cache)
    return x, (_combined(jnp.stack, routings), _combined(jnp.stack, grown))


def _rows(tree: Any, *, start: int, stop: int, run: Run) -> Any:
  """Of leaves [L, ...] a run's: [repeats, layers of a block, ...]."""
  shape = (run.repeats, len(run.kinds))
  return jax.tree.map(
    lambda leaf: leaf[start:stop].reshape(shape + leaf.shape[1:]), tree
  )


def _flat(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _combined(combine: Any, trees: Sequence[Any]) -> Any:
  """One tree out of those that are not None; None where all are."""
  trees = [tree for tree in trees if tree is not None]
  if not trees:
    return None
  return jax.tree.map(lambda *leaves: combine(leaves), *trees)
