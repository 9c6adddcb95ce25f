"""What a training step holds on a device, by arithmetic: no compiler.

State and batch are exact, by the rules that the step itself is laid out by.
The rest is a model of what the TPU compiler keeps at the same time:

  held throughout   a copy of the parameters in the compute dtype, made once,
                    before the loop over layers; what the backward pass is left
                    of every layer, by the remat policy; the sums of gradients
                    of microbatches
  at the loss       the LM head, gathered, and the logits twice: in float32, and
                    their gradient in the compute dtype
  backward          gradients, in float32, and what one layer takes: kernels,
                    gathered; rows of experts; attention

and temporaries = held + the larger of the two. Letters are of core/axes.py; of
a device are M tokens of a microbatch, and c is the bytes of a compute number.
benchmarks/plan_memory.py compares with the compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from aquila_jax.core.axes import LeafAxes
from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.rules import spec_of

_WIDE = 4  # bytes of float32: moments, gradients, logits
# The splash kernel's: T is a multiple of it, and a number a query fills it.
_LANES = 128
# int32 tokens, targets, segments, positions, languages; float32 weights.
_BATCH_BYTES = 6 * 4
# The mesh axis that cuts what a token becomes, and not the tokens.
_TENSOR = "tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """Bytes of a device that a step is given."""

  parameters: int
  optimizer: int  # moments, and an EMA
  batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temporaries:
  """Bytes of a device beside the state, by what they are for."""

  copies: int  # of the parameters in the compute dtype
  saved: int  # of all layers for the backward pass
  sums: int  # of gradients, over microbatches
  loss: int  # LM head and logits
  gradients: int
  layer: int  # what one takes in the backward pass

  @property
  def total(self) -> int:
    """The most that there is at once."""
    held = self.copies + self.saved + self.sums
    return held + max(self.loss, self.gradients + self.layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
  """A parameter leaf on a mesh."""

  axes: LeafAxes
  shape: tuple[int, ...]
  dtype: jnp.dtype

  def numbers(self, mesh: AbstractMesh, *, gathered: bool = False) -> int:
    """Of a device; with what the other devices hold of a kernel's rows."""
    spec = spec_of(self.axes.names, self.shape, mesh=mesh)
    parts = 1
    for entry in spec:
      names = entry if isinstance(entry, tuple) else (entry,)
      for name in names:
        if name is not None and not (gathered and name == "fsdp"):
          parts *= mesh.shape[name]
    return math.prod(self.shape) // parts


@functools.cache
def _leaves(model: ModelConfig) -> tuple[_Leaf, ...]:
  shapes = jax.tree.leaves(decoder_lm.abstract_params(model))
  declared = jax.tree.leaves(decoder_lm.parameter_axes(model))
  return tuple(
    _Leaf(axes=axes, shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype))
    for leaf, axes in zip(shapes, declared, strict=True)
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A stage's training step on a mesh, as far as memory goes."""

  model: ModelConfig
  train: TrainConfig
  mesh: AbstractMesh

  @property
  def tokens(self) -> int:
    """M, of a device in a microbatch."""
    sizes = self.mesh.shape.items()
    parts = math.prod(size for axis, size in sizes if axis != _TENSOR)
    return self.train.tokens_per_step // self.train.num_microbatches // parts

  @property
  def compute_bytes(self) -> int:
    """c."""
    return jnp.dtype(self.model.compute_dtype).itemsize

  def state(self) -> State:
    """What the step is given, exactly.

    Raises:
      errors.UserError: where a mesh axis does not divide a size of the model.
    """
    leaves = [(leaf, leaf.numbers(self.mesh)) for leaf in _leaves(self.model)]
    wide = sum(n * max(_WIDE, leaf.dtype.itemsize) for leaf, n in leaves)
    copies = 2 + (self.train.optimizer.ema_decay is not None)
    tokens = self.tokens * self.train.num_microbatches
    return State(
      parameters=sum(n * leaf.dtype.itemsize for leaf, n in leaves),
      # And Adam's count.
      optimizer=copies * wide + _WIDE,
      batch=_BATCH_BYTES * tokens + _WIDE,
    )

  def temporaries(self) -> Temporaries:
    """What the step takes beside, by the model of the module."""
    leaves, c = _leaves(self.model), self.compute_bytes
    numbers = sum(leaf.numbers(self.mesh) for leaf in leaves)
    is_copied = jnp.dtype(self.model.param_dtype).itemsize != c
    gradients = numbers * _WIDE
    return Temporaries(
      copies=numbers * c if is_copied else 0,
      saved=self._saved(),
      sums=gradients if self.train.num_microbatches > 1 else 0,
      loss=self._loss(),
      gradients=gradients,
      layer=self._layer(),
    )

  def _parts(self, size: int) -> int:
    """What of a size a device has along `tensor`, where that divides it."""
    parts = self.mesh.shape.get(_TENSOR, 1)
    return size if size % parts else size // parts

  def _saved(self) -> int:
    model, c, m = self.model, self.compute_bytes, self.tokens
    carried = m * model.embed_dim * c
    return model.num_layers * carried

  def _loss(self) -> int:
    c = self.compute_bytes
    vocab = self._parts(self.model.vocab_size)
    head = self.model.embed_dim * vocab * c
    return head + self.tokens * vocab * (_WIDE + c)

  def _layer(self) -> int:
    model, c, m = self.model, self.compute_bytes, self.tokens
    heads = self._parts(model.num_heads)
    row_sums = m * heads * _LANES * _WIDE
    attention = row_sums + 6 * m * model.embed_dim * c
    return attention + (self._dense_ffn() if model.moe is None else self._experts())

  def _experts(self) -> int:
    model, c = self.model, self.compute_bytes
    assert model.moe is not None
    width = self._parts(model.mlp_dim)
    experts = model.moe.num_experts // self.mesh.shape.get("expert", 1)
    kernel = experts * model.embed_dim * width * c
    rows = self._rows()
    return 3 * kernel + 3 * rows * width * c + 2 * rows * model.embed_dim * c

  def _rows(self) -> int:
    """Slots of a device's experts."""
    moe = self.model.moe
    assert moe is not None
    devices = self.mesh.shape.get("expert", 1)
    rows = self.tokens * moe.top_k
    experts = moe.num_experts // devices
    if devices > 1:
      most = devices * self.tokens * min(moe.top_k, experts)
      rows = min(most, math.ceil(moe.buffer_factor * rows))
    return rows + experts * (moe.block_size - 1)

  def _dense_ffn(self) -> int:
    model, c = self.model, self.compute_bytes
    width = self._parts(model.dense_mlp_dim)
    kernel = model.embed_dim * width * c
    return 3 * kernel + 4 * self.tokens * width * c
