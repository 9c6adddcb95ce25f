"""What a training step holds on a device, by arithmetic: no compiler.

State and batch are exact, by the rules that the step itself is laid out by.
The rest is a model of what the TPU compiler keeps at the same time:

  held throughout   a copy of the parameters in the compute dtype, made once,
                    before the loop over layers; what the backward pass is left
                    of every layer, by the remat policy; the sums of gradients
                    of microbatches
  at the loss       the LM head, gathered, and the logits twice: in float32, and
                    their gradient in the compute dtype; of a part of the tokens
                    with head_chunks, beside the float32 sum of the head's
                    gradient
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

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from aquila_jax.core.axes import LeafAxes
from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.rules import GATHERED, spec_of

_WIDE = 4  # bytes of float32: moments, gradients, logits
# The splash kernel's: T is a multiple of it, and a number a query fills it.
_LANES = 128
# Rows of a tile of registers.
_SUBLANES = 8
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
class Leaf:
  """A parameter leaf on a mesh."""

  axes: LeafAxes
  shape: tuple[int, ...]
  dtype: jnp.dtype

  def numbers(self, mesh: AbstractMesh, *, gathered: bool = False) -> int:
    """Of a device; with what the other devices hold of a kernel's rows."""
    return _numbers(self, mesh, gathered)

  def is_copied(self, mesh: AbstractMesh) -> bool:
    """Whether what is gathered has to be copied into place.

    It comes interleaved where the rows of a device fill no tile of registers.
    """
    spec = spec_of(self.axes.names, self.shape, mesh=mesh)
    for size, entry in zip(self.shape, spec, strict=True):
      names = entry if isinstance(entry, tuple) else (entry,)
      if any(mesh.shape[name] > 1 for name in names if name in GATHERED):
        parts = math.prod(mesh.shape[name] for name in names if name)
        return size // parts % _SUBLANES > 0
    return False


@functools.cache
def _numbers(leaf: Leaf, mesh: AbstractMesh, gathered: bool) -> int:
  parts = 1
  for entry in spec_of(leaf.axes.names, leaf.shape, mesh=mesh):
    for name in entry if isinstance(entry, tuple) else (entry,):
      if name is not None and not (gathered and name in GATHERED):
        parts *= mesh.shape[name]
  return math.prod(leaf.shape) // parts


@functools.cache
def leaves(model: ModelConfig) -> tuple[Leaf, ...]:
  shapes = jax.tree.leaves(decoder_lm.abstract_params(model))
  declared = jax.tree.leaves(decoder_lm.parameter_axes(model))
  return tuple(
    Leaf(axes=axes, shape=tuple(leaf.shape), dtype=jnp.dtype(leaf.dtype))
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
    """Of a number that is computed with, c."""
    return jnp.dtype(self.model.compute_dtype).itemsize

  def state(self) -> State:
    """What the step is given, exactly.

    Raises:
      errors.UserError: where a mesh axis does not divide a size of the model.
    """
    cut = [(leaf, leaf.numbers(self.mesh)) for leaf in leaves(self.model)]
    wide = sum(n * max(_WIDE, leaf.dtype.itemsize) for leaf, n in cut)
    copies = 2 + (self.train.optimizer.ema_decay is not None)
    tokens = self.tokens * self.train.num_microbatches
    return State(
      parameters=sum(n * leaf.dtype.itemsize for leaf, n in cut),
      # And Adam's count.
      optimizer=copies * wide + _WIDE,
      batch=_BATCH_BYTES * tokens + _WIDE,
    )

  def temporaries(self) -> Temporaries:
    """What the step takes beside, by the model of the module."""
    c = self.compute_bytes
    numbers = sum(leaf.numbers(self.mesh) for leaf in leaves(self.model))
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

  @property
  def total(self) -> int:
    """Bytes of a device.

    Raises:
      errors.UserError: as `state`.
    """
    state = self.state()
    held = state.parameters + state.optimizer + state.batch
    return held + self.temporaries().total

  @property
  def logit_bytes(self) -> int:
    """Of a microbatch, and of their gradient."""
    vocab = self._parts(self.model.vocab_size)
    return self.tokens * vocab * (_WIDE + self.compute_bytes)

  def tile_share(self, tile_rows: int) -> float:
    """Rows that experts compute in whole tiles, over those that there are.

    A tile in which experts meet counts for each of them. Of a dense model 1.
    """
    if self.model.moe is None:
      return 1.0
    rows = self.tokens * self.model.moe.top_k
    return 1 + (self._local_experts() - 1) * tile_rows / rows

  @property
  def filled(self) -> float:
    """Of a device's slots for rows of experts, where these are met evenly.

    Where it holds all experts, 1: they are made for what there is.
    """
    if self.model.moe is None or self.mesh.shape.get("expert", 1) == 1:
      return 1.0
    return self.tokens * self.model.moe.top_k / self.rows()

  def _local_experts(self) -> int:
    assert self.model.moe is not None
    return self.model.moe.num_experts // self.mesh.shape.get("expert", 1)

  def _parts(self, size: int) -> int:
    """What of a size a device has along `tensor`, where that divides it."""
    parts = self.mesh.shape.get(_TENSOR, 1)
    return size if size % parts else size // parts

  def _saved(self) -> int:
    """What layers are entered with, and what their remat leaves beside."""
    model, m, c = self.model, self.tokens, self.compute_bytes
    if model.remat == "none":
      layer = m * self._everything()
      layer += self._mixed() if model.moe else 6 * m * self._ffn_width() * c
    elif model.remat == "dots":
      layer = m * (model.embed_dim + self._products()) * c
    else:
      layer = m * model.embed_dim * c
    return model.num_layers * layer

  def _everything(self) -> int:
    """Bytes of a token that a layer without remat leaves, but for its FFN.

    Three arrays of each norm in float32; the entry and what enters the FFN;
    queries and what attention gives them, keys and values before and after.
    """
    model, c = self.model, self.compute_bytes
    queries = self._parts(model.num_heads) * model.head_dim
    keys = self._parts(model.num_kv_heads) * model.head_dim
    numbers = 2 * model.embed_dim + 2 * queries + 4 * keys
    return 6 * model.embed_dim * _WIDE + numbers * c

  def _mixed(self) -> int:
    """Bytes that a mixture without remat leaves, gathered kernels too."""
    model, m, c = self.model, self.tokens, self.compute_bytes
    assert model.moe is not None
    left = 3 * self._local_experts() * model.embed_dim * self._ffn_width() * c
    if self.mesh.shape.get("expert", 1) > 1:
      return left + m * model.embed_dim * c
    rows = 2 * self._ffn_width() + model.embed_dim
    routed = model.moe.top_k * c + _WIDE
    return left + self.rows() * rows * c + m * model.embed_dim * routed

  def _ffn_width(self) -> int:
    return self._parts(self.model.mlp_dim)

  def _products(self) -> int:
    """Numbers of a token: query, keys, values, attention; gate and up."""
    model = self.model
    heads = self._parts(model.num_heads) + 2 * self._parts(model.num_kv_heads)
    numbers = heads * model.head_dim + model.embed_dim
    if model.moe is None:
      numbers += 2 * self._ffn_width()
    return numbers

  def _loss(self) -> int:
    c = self.compute_bytes
    vocab = self._parts(self.model.vocab_size)
    chunks = self.model.head_chunks
    number = c if chunks == 1 else c + _WIDE
    head = self.model.embed_dim * vocab * number
    return head + self.logit_bytes // chunks

  def _layer(self) -> int:
    model, c, m = self.model, self.compute_bytes, self.tokens
    heads = self._parts(model.num_heads)
    row_sums = m * heads * _LANES * _WIDE
    attention = row_sums + 6 * m * model.embed_dim * c
    sequence = self.mesh.shape.get("sequence", 1)
    if sequence > 1:
      # Keys and values of all tokens of the rows, and their gradients.
      keys = self._parts(model.num_kv_heads) * model.head_dim
      attention += 4 * m * sequence * keys * c
    return attention + (
      self._dense_ffn() if model.moe is None else self._experts()
    )

  def _experts(self) -> int:
    model, c = self.model, self.compute_bytes
    assert model.moe is not None
    width = self._ffn_width()
    kernel = self._local_experts() * model.embed_dim * width * c
    token, rows = model.embed_dim * c, self.rows()
    devices = self.mesh.shape.get("expert", 1)
    # Gate and up, and the gradients of both, which one kernel makes; of all
    # three where a conditional has them in and out.
    count = 6 if devices > 1 else 4 + self._are_kernels_copied()
    # What is gathered, and its gradient; where gates weigh here, weighed too.
    moved = 4 if self.weighs_here else 2
    everyone = 0
    if devices > 1 and model.moe.exchange == "all_gather":
      # Tokens of all, what comes of them, and the gradients of both.
      everyone = 4 * devices * self.tokens * token
    layer = count * kernel + 3 * rows * width * c
    return layer + moved * rows * token + everyone

  @property
  def weighs_here(self) -> bool:
    """Whether experts know the gates of their rows, of a mixture.

    Then the last product is not computed again (layers/moe/mixture.py).
    """
    moe = self.model.moe
    if moe is None or moe.choice != "token":
      return False
    return self.mesh.shape.get("expert", 1) == 1 or moe.exchange == "all_gather"

  def _are_kernels_copied(self) -> bool:
    return any(
      leaf.axes.has("expert")
      and leaf.axes.has("mlp")
      and leaf.is_copied(self.mesh)
      for leaf in leaves(self.model)
    )

  def rows(self) -> int:
    """Slots of a device's experts, of a mixture."""
    moe = self.model.moe
    assert moe is not None
    devices = self.mesh.shape.get("expert", 1)
    rows = self.tokens * moe.top_k
    experts = self._local_experts()
    if devices > 1:
      most = devices * self.tokens * min(moe.top_k, experts)
      rows = min(most, math.ceil(moe.buffer_factor * rows))
    return rows + experts * (moe.block_size - 1)

  def _dense_ffn(self) -> int:
    model, c = self.model, self.compute_bytes
    width = self._ffn_width()
    kernel = model.embed_dim * width * c
    return 3 * kernel + 4 * self.tokens * width * c
