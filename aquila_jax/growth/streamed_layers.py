"""A layer of a decoder that is read from slices, one expert at a time.

What is in memory is a layer's attention and the kernels of one FFN or expert,
of which a part at a time is as wide as it is computed in. So a mixture runs of
which no memory holds a layer.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth.grown_tree import Index, LeafSpec, Tree, slices
from aquila_jax.kernels.expert_ffn.api import expert_ffn
from aquila_jax.layers.feed_forward import KERNEL_AXES, mask_rows
from aquila_jax.layers.moe.mixture import make_choice
from aquila_jax.layers.moe.router import Router
from aquila_jax.layers.moe.shared_expert import SharedExpert
from aquila_jax.models import decoder_lm, layer_runs
from aquila_jax.models.growth_mask import Masks, make_masks

_LAYERS = "layers"
# Hidden units that are computed at once.
_UNITS = 4096


class StreamedLayers:
  """The layers of a decoder.

  Args:
    config: of the decoder; it computes in `compute_dtype`.
    params: its parameters.
    leaves: of the decoder, by name.
  """

  def __init__(
    self, config: ModelConfig, params: Tree, leaves: Mapping[str, LeafSpec]
  ):
    self._config = config
    self._params = params
    self._leaves = leaves
    self._masks = make_masks(config)

  def read(self, number: int) -> StreamedLayer:
    """One layer; of its FFN or experts nothing is read yet."""
    own, ffn = {}, {}
    for name, spec in self._leaves.items():
      folder, _, inside = name.partition(".")
      row = spec.axes.row_of(number)
      if folder != _LAYERS or row is None:
        continue
      if spec.axes.has("mlp") or spec.axes.has("dense_mlp"):
        ffn[inside.rpartition(".")[2]] = functools.partial(
          _kernel, self._params, name, row
        )
      else:
        own[inside] = _filled(self._params, name, spec, row)
    shares = self._masks.layers
    return StreamedLayer(
      config=self._config,
      params=traverse_util.unflatten_dict(own, sep="."),
      ffn=ffn,
      has_experts=number in self._config.moe_layers,
      share=None if shares is None else shares[number],
      masks=self._masks,
    )


def _kernel(params: Tree, name: str, row: int, *expert: int) -> np.ndarray:
  return params.read(name, index=(row, *expert, slice(None), slice(None)))


def _filled(params: Tree, name: str, spec: LeafSpec, row: int) -> jax.Array:
  """A leaf's part of a layer."""
  filled = np.empty(spec.shape[1:], spec.dtype)
  for index in slices(spec):
    if index[0] == row:
      rest: Index = index[1:]
      filled[rest] = params.read(name, index=index)
  return jnp.asarray(filled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedLayer:
  """A layer, to be called on rows of text."""

  config: ModelConfig
  params: dict[str, Any]  # of all but its FFN or experts
  ffn: dict[str, Any]  # reads each kernel, of experts that of a number
  has_experts: bool
  share: Float[Array, ""] | None
  masks: Masks

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[np.ndarray, "B T"],
    segments: Int[np.ndarray, "B T"],
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The residual behind the layer, and what its FFN reads.

    Args:
      x: the residual.
      positions: of the tokens in their documents.
      segments: their documents; 0 is padding.
    """
    front = {
      name: self.params[name]
      for name in ("attention", "attention_norm", "mlp_norm")
    }
    x, normed = _first_half(
      self.config, front, x, positions, segments, self.share, self.masks
    )
    if self.has_experts:
      out = self._mixture(normed, segments)
    else:
      rows = normed.reshape(1, -1, normed.shape[-1])  # one block
      out = self._through(rows).reshape(normed.shape)
    return decoder_lm.add(x, out, self.share), normed

  def _mixture(
    self, normed: Float[Array, "B T D"], segments: Int[np.ndarray, "B T"]
  ) -> Float[Array, "B T D"]:
    params = self.params[layer_runs.EXPERTS]
    tokens = normed.reshape(-1, normed.shape[-1])  # (B, T, D) -> (M, D)
    plan, rows = _routed(
      self.config, params["router"], tokens, segments.reshape(-1)
    )
    out = _combined(
      self.config,
      params.get("shared"),
      plan,
      self._through_experts(plan, rows),
      tokens,
      segments.reshape(-1),
    )
    return out.reshape(normed.shape)

  def _through_experts(
    self, plan: Any, rows: Float[Array, "P Q D"]
  ) -> Float[np.ndarray, "P Q D"]:
    """Every block through its expert, expert after expert."""
    moe = self.config.moe
    assert moe is not None
    out = np.zeros(rows.shape, rows.dtype)
    expert_of = np.asarray(plan.block_expert)[: int(plan.num_blocks)]
    for expert in range(moe.num_experts):
      blocks = np.flatnonzero(expert_of == expert)
      if not len(blocks):
        continue
      # A power of two of them, so that few are compiled.
      padded = np.resize(blocks, 1 << (len(blocks) - 1).bit_length())
      found = self._through(_taken(rows, padded), expert)
      out[blocks] = np.asarray(found)[: len(blocks)]
    return out

  def _through(
    self, rows: Float[Array, "P Q D"], *expert: int
  ) -> Float[Array, "P Q D"]:
    """Through the FFN or an expert, a part of its hidden units at a time."""
    gate, up, down = (self.ffn[name](*expert) for name in KERNEL_AXES)
    mask = self.masks.mlp

    def part(start: int) -> jax.Array:
      units = slice(start, start + _UNITS)
      kernels = (gate[:, units], up[:, units], down[units])
      return _units(rows, kernels, None if mask is None else mask[units])

    return functools.reduce(
      operator.add, map(part, range(0, len(down), _UNITS))
    )


@functools.partial(jax.jit, static_argnums=0)
def _first_half(config, params, x, positions, segments, share, masks):
  half: Any = decoder_lm.FirstHalf(config)
  return half.apply({"params": params}, x, positions, segments, share, masks)


@functools.partial(jax.jit, static_argnums=0)
def _routed(config, params, tokens, segments):
  router: Any = Router(config, config.moe)
  affinity = router.apply({"params": params}, tokens, valid=segments > 0)
  plan, _ = make_choice(config.moe).dispatch(affinity, num_rows=1)
  return plan, plan.gather(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _combined(config, shared_params, plan, rows, tokens, segments):
  out = plan.combine(rows)
  if config.moe.shared_expert_dim:
    expert: Any = SharedExpert(config)
    shared = expert.apply({"params": shared_params}, tokens)
    out += shared * (segments > 0)[:, None].astype(shared.dtype)
  return out


@jax.jit
def _taken(rows, blocks):
  return rows[blocks]


@jax.jit
def _units(rows, kernels, mask):
  gate, up, down = (kernel[None].astype(rows.dtype) for kernel in kernels)
  count = rows.shape[0]
  return expert_ffn(
    rows,
    (gate, up, mask_rows(down, mask)),
    block_expert=jnp.zeros(count, jnp.int32),
    num_blocks=jnp.asarray(count, jnp.int32),
  )
