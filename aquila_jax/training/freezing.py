"""Which elements of the parameters train, from the declared axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from aquila_jax.core import errors
from aquila_jax.core.axes import AXIS_NAMES, LeafAxes
from aquila_jax.core.experiment_config import FreezeConfig
from aquila_jax.core.types import Params

# Of an axis name: half-open ranges of the indices that the last growth added.
NewIndices = Mapping[str, Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class LeafMask:
  """Which elements of one leaf train, as small vectors along its dimensions.

  An element trains if it is in `layers` and in any of `new`. The vectors are
  joined inside the jitted step: a full mask would be a constant of the
  program as large as a quarter of the leaf.
  """

  layers: np.ndarray  # bool, broadcastable to the leaf
  new: tuple[np.ndarray, ...] | None  # bool, broadcastable; None is all

  def array(self) -> Bool[Array, "..."]:
    """The mask, broadcastable to the leaf (of its rank, with ones)."""
    mask = jnp.asarray(self.layers)
    if self.new is None:
      return mask
    shape = np.broadcast_shapes(self.layers.shape, *(n.shape for n in self.new))
    is_new = jnp.zeros(shape, bool)
    for vector in self.new:
      is_new |= jnp.broadcast_to(vector, shape)
    return jnp.broadcast_to(mask, shape) & is_new

  def is_frozen(self) -> bool:
    """Whether no element trains."""
    nothing_new = self.new is not None and not any(n.any() for n in self.new)
    return nothing_new or not self.layers.any()


def trainable_masks(
  config: FreezeConfig,
  *,
  axes: Any,
  shapes: Any,
  new_indices: NewIndices | None = None,
  path: str = "config.freeze",
) -> Any:
  """The mask of every leaf, or None for a leaf that trains as a whole.

  Args:
    config: the three rules; an element that any of them freezes stands still.
    axes: the `LeafAxes` of every parameter.
    shapes: the parameters or their shapes, in the same structure.
    new_indices: what the last growth added; None where nothing was grown.
    path: the dotted name of `config`, for messages.

  Returns:
    A tree of `LeafMask | None`.

  Raises:
    errors.UserError: on an axis that is not one, layers that the model does not
      have, `new_only` where nothing is new, or if nothing would train.
  """
  _check(config, new_indices, path=path)
  masks = jax.tree.map(
    lambda leaf, shape: _leaf_mask(
      config, leaf, shape.shape, new_indices=new_indices or {}, path=path
    ),
    axes,
    shapes,
  )
  leaves = jax.tree.leaves(masks, is_leaf=lambda node: node is None)
  if all(leaf is not None and leaf.is_frozen() for leaf in leaves):
    raise errors.UserError(f"{path}: it freezes every parameter")
  return masks


def select(masks: Any, chosen: Params, *, otherwise: Params) -> Params:
  """`chosen` where a mask trains an element, `otherwise` where it does not.

  Args:
    masks: of `trainable_masks`.
    chosen: a tree shaped as the parameters.
    otherwise: another.

  Returns:
    A tree shaped as the parameters.
  """
  return jax.tree.map(
    lambda mask, a, b: a if mask is None else jnp.where(mask.array(), a, b),
    masks,
    chosen,
    otherwise,
    is_leaf=lambda node: node is None,
  )


def _check(
  config: FreezeConfig, new_indices: NewIndices | None, *, path: str
) -> None:
  for i, name in enumerate(config.axes):
    if name not in AXIS_NAMES:
      raise errors.unknown_name(f"{path}.axes[{i}]", name, AXIS_NAMES)
  if not config.new_only:
    return
  if new_indices is None:
    raise errors.UserError(
      f"{path}.new_only=True: expected a model that was grown; its lineage has"
      " no scale_up"
    )
  if not any(stop > start for r in new_indices.values() for start, stop in r):
    raise errors.UserError(
      f"{path}.new_only=True: the last growth of the model added nothing"
    )


def _leaf_mask(
  config: FreezeConfig,
  leaf: LeafAxes,
  shape: tuple[int, ...],
  *,
  new_indices: NewIndices,
  path: str,
) -> LeafMask | None:
  layers = np.full((1,) * len(shape), not any(map(leaf.has, config.axes)))
  start, stop = config.layers
  stack = leaf.index("layer")
  if stack is not None:
    # Leaves that all layers have are in every model, and say how many.
    if leaf.layers is None and not 0 <= start <= stop <= shape[stack]:
      raise errors.UserError(
        f"{path}.layers={config.layers}: expected 0 <= start <= stop <="
        f" {shape[stack]}, the layers of the model"
      )
    if start < stop:
      layers = layers & ~_along(stack, [(start, stop)], leaf, shape)
  new = None
  if config.new_only:
    new = tuple(
      _along(dim, new_indices[name], leaf, shape)
      for dim, name in enumerate(leaf.names)
      if name in new_indices
    )
  if new is None and layers.all():
    return None
  return LeafMask(layers=layers, new=new)


def _along(
  dim: int,
  ranges: Sequence[Sequence[int]],
  leaf: LeafAxes,
  shape: tuple[int, ...],
) -> np.ndarray:
  """A bool vector along `dim`, true in the ranges; `layer` is the model's."""
  indices = np.arange(shape[dim])
  if leaf.names[dim] == "layer" and leaf.layers is not None:
    indices = np.asarray(leaf.layers)
  vector = np.zeros(len(indices), bool)
  for start, stop in ranges:
    vector |= (start <= indices) & (indices < stop)
  return vector.reshape([-1 if d == dim else 1 for d in range(len(shape))])
