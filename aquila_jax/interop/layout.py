"""From our leaves to the tensors of a published checkpoint, and back.

A leaf's declared axes say how its tensor lies: checkpoints keep a linear layer
as [out, in], so

  tensor = leaf, axes in the order (neither, written, read), and what is written
           flattened to one dimension, what is read to another

`layer` is taken apart, and `expert` where the names of the tensors have one.
Only those names are a table (names.py); no layout is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aquila_jax.core.axes import Axis, LeafAxes, Role
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.models import decoder_lm

# In this order in a tensor.
_ROLES = (Role.NEITHER, Role.WRITES, Role.READS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
  """One tensor, and the part of a leaf that it holds."""

  tensor: str
  shape: tuple[int, ...]  # of the tensor
  leaf: str  # keys joined by dots
  index: tuple[int, ...]  # of the leaf's leading dimensions
  axes: tuple[Axis, ...]  # of leaf[index]
  part: tuple[int, ...]  # the shape of leaf[index]

  def to_tensor(self, part: np.ndarray) -> np.ndarray:
    """leaf[index] as the tensor."""
    assert part.shape == self.part, (self.leaf, part.shape)
    return part.transpose(self._order).reshape(self.shape)

  def to_part(self, tensor: np.ndarray) -> np.ndarray:
    """The tensor as leaf[index]; the inverse of `to_tensor`."""
    assert tensor.shape == self.shape, (self.tensor, tensor.shape)
    spread = tensor.reshape([self.part[dim] for dim in self._order])
    return spread.transpose(np.argsort(self._order))

  @property
  def _order(self) -> list[int]:
    """The dimensions of leaf[index], in the order of the tensor."""
    return [
      dim
      for role in _ROLES
      for dim, axis in enumerate(self.axes)
      if axis.role == role
    ]


def slots(config: ModelConfig, names: Mapping[str, str]) -> list[Slot]:
  """Every tensor of a model, leaf by leaf.

  Args:
    config: the architecture.
    names: for the keys of a leaf, joined by dots, the name of its tensors with
      `{layer}` and, where experts are apart, `{expert}`.

  Returns:
    Slots that fill every element of every leaf once.

  Raises:
    KeyError: where a leaf has no name.
  """
  shapes = jax.tree_util.tree_flatten_with_path(
    decoder_lm.abstract_params(config)
  )[0]
  declared = jax.tree.leaves(decoder_lm.parameter_axes(config))
  return [
    slot
    for (path, shape), axes in zip(shapes, declared, strict=True)
    for slot in _slots_of(_key(path), shape.shape, axes, names)
  ]


def _slots_of(
  leaf: str, shape: tuple[int, ...], axes: LeafAxes, names: Mapping[str, str]
) -> Iterator[Slot]:
  name = names[leaf]
  apart = [
    axis
    for axis in axes.axes
    if axis.role == Role.NEITHER and f"{{{axis.name}}}" in name
  ]
  assert tuple(apart) == axes.axes[: len(apart)], leaf
  part, rest = shape[len(apart) :], axes.axes[len(apart) :]
  for index in itertools.product(*map(range, shape[: len(apart)])):
    numbers = {axis.name: i for axis, i in zip(apart, index, strict=True)}
    if "layer" in numbers:
      numbers["layer"] = axes.layer_of(numbers["layer"])
    yield Slot(
      tensor=name.format(**numbers),
      shape=_tensor_shape(part, rest),
      leaf=leaf,
      index=index,
      axes=rest,
      part=part,
    )


def _tensor_shape(
  part: tuple[int, ...], axes: tuple[Axis, ...]
) -> tuple[int, ...]:
  """[*neither, written, read], without a group that the leaf has not."""
  sizes = {
    role: [n for n, a in zip(part, axes, strict=True) if a.role == role]
    for role in _ROLES
  }
  flat = [math.prod(sizes[r]) for r in (Role.WRITES, Role.READS) if sizes[r]]
  return (*sizes[Role.NEITHER], *flat)


def _key(path: Any) -> str:
  return ".".join(entry.key for entry in path)
