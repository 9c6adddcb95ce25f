"""A growth: index maps and sources, and what they make of a leaf.

A method of Scale-Up (methods.py) chooses a `Growth`. Everything else follows
from it and from the declared axes: every leaf of parameters, average and
moments (here), whether the function is kept (exactness.py), and what the
lineage says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from aquila_jax.core import dtypes
from aquila_jax.core.axes import Axis, LeafAxes, Role
from aquila_jax.core.model_config import (
  MASKED_SIZES,
  GrowthMask,
  ModelConfig,
)
from aquila_jax.growth import axis_map
from aquila_jax.growth.axis_map import AxisMap, AxisMaps, Powers
from aquila_jax.growth.depth import LayerMap


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
  """A method: one map an axis, and whose values the new indices take."""

  width: AxisMaps  # of every axis but `layer` and `vocab`
  layers: LayerMap
  # Rows of new tokens: EMPTY is the mean of all rows.
  vocab: AxisMap | None = None
  # Written axes whose new indices take the values of the next layer of the
  # source; none is FPI.
  from_next_layer: frozenset[str] = frozenset()
  # What is added to the shares that the readers of copies get: its standard
  # deviation relative to their root mean square. Over the copies of an index
  # it sums to zero, so nothing changes but that the copies can part.
  noise: float = 0.0
  # Whether the model starts under a growth mask of 0 (models/growth_mask.py),
  # which is all that its new indices and layers then count.
  masked: bool = False
  # Whether the maps are only where a learned operator starts (ligo.py).
  learned: bool = False

  @property
  def maps(self) -> dict[str, AxisMap]:
    """Every axis's map, by name."""
    vocab = {} if self.vocab is None else {"vocab": self.vocab}
    return {"layer": self.layers.copies, **self.width, **vocab}

  @property
  def new_indices(self) -> dict[str, list[list[int]]]:
    """For each axis that grows, the half-open ranges that it gains."""
    return {name: m.new_ranges for name, m in self.maps.items() if m.new_ranges}

  @property
  def mean_square_factor(self) -> float | None:
    """Of the residual; see axis_map.py. A mask leaves the mean what it was."""
    return 1.0 if self.masked else self.width["embed"].mean_square_factor

  def config(self, source: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The architecture of the grown model: `target`, under its mask."""
    if not self.masked:
      return target
    copies = self.layers.copies
    mask = GrowthMask(
      **{name: getattr(source, name) for name in MASKED_SIZES},
      new_layers=tuple(np.flatnonzero(copies.is_new).tolist()),
    )
    return dataclasses.replace(target, growth_mask=mask)

  @property
  def keeps_layers(self) -> bool:
    """Whether the layers that count are the source's, in order, once each."""
    copies = self.layers.copies
    counting = ~self.layers.silent
    if self.masked:
      counting = counting & ~copies.is_new
    return copies.source[counting].tolist() == list(range(copies.source_size))

  def source_layers(self, layer: int) -> tuple[int, int]:
    """The layer that a target layer copies, and the one above that.

    The last layer has none above it, and stands for it itself.
    """
    copies = self.layers.copies
    own = int(copies.source[layer])
    return own, min(own + 1, copies.source_size - 1)

  def takes_next_layer(self, axes: LeafAxes) -> bool:
    """Whether a leaf has entries that come from the layer above."""
    return axes.has("layer") and bool(
      self.from_next_layer.intersection(self._grown(axes, Role.WRITES))
    )

  def slice(
    self,
    own: Float[np.ndarray, "*source"],
    above: Float[np.ndarray, "*source"],
    *,
    axes: LeafAxes,
    powers: Powers,
    rng: np.random.Generator,
    silent: bool,
    dtype: np.dtype,
  ) -> Float[np.ndarray, "*target"]:
    """A slice of a grown leaf, out of the slices of the source's.

    A slice is one layer of one expert; the leaf has no other stacked axes.

    Args:
      own: of the layer that is copied.
      above: of the layer above it; unused where `takes_next_layer` is not.
      axes: of the whole leaf, `layer` and `expert` in front.
      powers: as for `axis_map.map_axes`.
      rng: for what is drawn.
      silent: whether the layer is one that adds nothing.
      dtype: of the slice; it is computed in at least float32.

    Returns:
      The slice.
    """
    rest, silent = _inside(axes), silent and _writes_residual(axes)
    noise = self.layers.silent_noise if silent else self.noise
    noisy = powers.draws and noise > 0 and self._reads_copies(axes)
    scaled = axes.is_norm_scale and self._scale_factor(rest) != 1
    wide = np.dtype(dtypes.at_least_float32(own.dtype))

    def mapped(values: np.ndarray) -> np.ndarray:
      between = wide if noisy or scaled else dtype
      return axis_map.map_axes(
        values, rest, self.width, powers=powers, dtype=between
      )

    grown = mapped(own)
    if self.takes_next_layer(axes):
      grown = np.where(self._new_outputs(rest), mapped(above), grown)
    if noisy:
      level = noise * _rms(grown)
      shares = np.zeros_like(grown) if silent else grown
      grown = shares + wide.type(level) * self._noise(rng, grown, rest)
    elif silent:
      grown = np.zeros_like(grown)
    if scaled:
      grown = grown * wide.type(self._scale_factor(rest) ** powers.norm)
    drawn = self._drawn(rest)
    if powers.draws and drawn is not None:
      grown = np.where(drawn, _new_entries(rng, grown, own, axes), grown)
    return grown.astype(dtype, copy=False)

  def _grown(self, axes: LeafAxes, role: Role) -> Iterator[str]:
    """The axes that the leaf has in a role, and that gain indices."""
    for axis in axes.axes:
      if axis.role is role and axis.name in self.width:
        if self.width[axis.name].is_new.any():
          yield axis.name

  def _new_outputs(self, axes: LeafAxes) -> np.ndarray:
    """True where a written index is new and takes the next layer's value."""
    new = np.zeros([1] * len(axes.axes), bool)
    for dim, axis in enumerate(axes.axes):
      if axis.role is Role.WRITES and axis.name in self.from_next_layer:
        is_new = self.width[axis.name].is_new
        new = new | axis_map.along(dim, is_new, rank=len(axes.axes))
    return new

  def _reads_copies(self, axes: LeafAxes) -> bool:
    """Whether a leaf maps, and reads what there are several of."""
    return axes.is_map and any(
      (self.width[name].counts > 1).any()
      for name in self._grown(axes, Role.READS)
    )

  def _noise(
    self, rng: np.random.Generator, like: np.ndarray, axes: LeafAxes
  ) -> np.ndarray:
    """Noise that sums to zero over the copies of whatever is read.

    Its variance is (C - 1) / C where an index has C copies; what has one copy,
    or is one, has no noise.
    """
    noise = rng.standard_normal(like.shape, like.dtype)
    mean = noise
    for dim, axis in enumerate(axes.axes):
      if axis.role is Role.READS and axis.name in self.width:
        mean = _mean_of_copies(mean, self.width[axis.name], dim)
    noise = noise - mean
    for dim, axis in enumerate(axes.axes):
      # What is written by zeros stays so.
      if axis.role is Role.WRITES and axis.name in self.width:
        empty = self.width[axis.name].is_empty
        noise = noise * axis_map.along(dim, ~empty, rank=noise.ndim)
    return noise

  def _scale_factor(self, axes: LeafAxes) -> float:
    """What a norm's scale is multiplied by."""
    (axis,) = axes.axes
    if axis.name not in self.width or self.masked:
      return 1.0
    factor = self.width[axis.name].mean_square_factor
    return 1.0 if factor is None else float(np.sqrt(factor))

  def _drawn(self, axes: LeafAxes) -> np.ndarray | None:
    """True where an entry is drawn, None where none is.

    An entry is new where any index of it is; it stays zero where one of these
    stands on the silent side of its axis. A bias is zero.
    """
    rank = len(axes.axes)
    new, zero = np.zeros([1] * rank, bool), np.zeros([1] * rank, bool)
    for dim, axis in enumerate(axes.axes):
      if axis.name not in self.width:
        continue
      g = self.width[axis.name]
      empty = axis_map.along(dim, g.is_empty, rank=rank)
      new = new | empty
      if axis.role is g.silent and not axes.is_norm_scale:
        zero = zero | empty
    drawn = new & ~zero
    is_bias = not (axes.is_map or axes.is_norm_scale or axes.has("vocab"))
    return None if is_bias or not drawn.any() else drawn


def _inside(axes: LeafAxes) -> LeafAxes:
  """The axes of a slice: without the stacks in front."""
  rest = tuple(axis for axis in axes.axes if not is_stacked(axis))
  return dataclasses.replace(axes, axes=rest)


def is_stacked(axis: Axis) -> bool:
  """Whether a slice has one index of an axis: layers, and experts of one."""
  return axis.role is Role.NEITHER and axis.name in ("layer", "expert")


def _writes_residual(axes: LeafAxes) -> bool:
  """Whether a leaf adds to the residual stream from inside a layer."""
  return (
    axes.has("layer")
    and axes.has("embed", Role.WRITES)
    and not axes.is_norm_scale
  )


def _rms(values: np.ndarray) -> float:
  wide = values.astype(dtypes.at_least_float32(values.dtype), copy=False)
  return float(np.sqrt(np.mean(np.square(wide), dtype=np.float64)))


def _mean_of_copies(values: np.ndarray, g: AxisMap, dim: int) -> np.ndarray:
  """Every entry's mean over all entries that copy the same index as it."""
  # What copies nothing is a group of its own, and its noise zero.
  groups = np.where(
    g.is_empty, g.source_size + np.arange(g.target_size), g.source
  )
  order = np.argsort(groups, kind="stable")
  firsts = np.flatnonzero(np.diff(groups[order], prepend=-1))
  sums = np.add.reduceat(np.take(values, order, axis=dim), firsts, axis=dim)
  sizes = np.diff(firsts, append=len(order)).astype(values.dtype)
  means = sums / axis_map.along(dim, sizes, rank=values.ndim)
  group_of = np.empty(len(order), int)
  group_of[order] = np.repeat(
    np.arange(len(firsts)), np.diff(firsts, append=len(order))
  )
  return np.take(means, group_of, axis=dim)


def _new_entries(
  rng: np.random.Generator, like: np.ndarray, own: np.ndarray, axes: LeafAxes
) -> np.ndarray:
  """Values for new entries, of the size of those that are there.

  Normal, with the root mean square of the source's slice; of a norm's scale
  its mean magnitude, since a scale of zero never trains what it multiplies.
  """
  wide = np.dtype(dtypes.at_least_float32(own.dtype))
  if axes.is_norm_scale:
    mean = np.mean(np.abs(own.astype(wide, copy=False)))
    return np.broadcast_to(mean, like.shape).astype(like.dtype)
  drawn = wide.type(_rms(own)) * rng.standard_normal(like.shape, wide)
  return drawn.astype(like.dtype)
