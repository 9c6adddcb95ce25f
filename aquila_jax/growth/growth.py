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
from aquila_jax.growth.axis_map import AxisMap, AxisMaps, Powers
from aquila_jax.growth.depth import LayerMap, rows_of
from aquila_jax.growth.matrix import (
  Columns,
  Side,
  bits,
  blocks,
  divided,
  make_side,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
  """A method: one map an axis, and whose values the new indices take."""

  width: AxisMaps  # of every axis but `layer` and `vocab`
  layers: LayerMap
  # Rows of new tokens: EMPTY is the mean of all rows.
  vocab: AxisMap | None = None
  # Written axes, keys of `width`, whose new indices take the values of the next
  # layer of the source; none is FPI.
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

  def source_rows(self, axes: LeafAxes, row: int) -> tuple[int, int]:
    """Of a stacked leaf: what a row of the target's copies of the source's.

    Args:
      axes: of the leaf in the target. The source has it in the layers that are
        copied by those that have it in the target (kinds.py checks that).
      row: of the leaf in the target.

    Returns:
      The row, and the one above it: of the next layer that has the leaf, in a
      stack of two kinds the next of its kind. The last one has none above it,
      and stands for it itself.
    """
    rows = rows_of(self.layers.copies, axes.layers)
    own = int(rows.source[row])
    return own, min(own + 1, rows.source_size - 1)

  def takes_next_layer(self, axes: LeafAxes) -> bool:
    """Whether a leaf has entries that come from the layer above."""
    return axes.has("layer") and any(
      axes.has(name, Role.WRITES) and self.width[name].is_new.any()
      for name in self.from_next_layer
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
    out: np.ndarray | None = None,
  ) -> Float[np.ndarray, "*target"]:
    """A slice of a grown leaf, out of the slices of the source's.

    A slice is one layer of one expert; the leaf has no other stacked axes.

    Args:
      own: of the layer that is copied.
      above: of the layer above it; unused where `takes_next_layer` is not.
      axes: of the whole leaf, `layer` and `expert` in front.
      powers: of the tree, by which counts are divided.
      rng: for what is drawn.
      silent: whether the layer is one that adds nothing.
      dtype: of the slice; it is computed in at least float32.
      out: filled and returned, where it is given: memory that is there already
        is faster than new memory.

    Returns:
      The slice.
    """
    rest = tuple(axis for axis in axes.axes if not is_stacked(axis))
    reads = sum(axis.role is not Role.WRITES for axis in rest)
    assert all(axis.role is Role.WRITES for axis in rest[reads:]), axes
    rows, columns = (
      make_side(
        part,
        shape,
        self.width,
        powers=powers,
        from_next_layer=self.from_next_layer
        if axes.has("layer")
        else frozenset(),
      )
      for part, shape in (
        (rest[:reads], own.shape[:reads]),
        (rest[reads:], own.shape[reads:]),
      )
    )
    source = (-1, int(np.prod(own.shape[reads:], dtype=int)))
    own, above = own.reshape(source), above.reshape(source)
    filler = _Filler(
      own, above, rows=rows, columns=columns, dtype=dtype, out=out
    )
    silent = silent and _writes_residual(axes)
    noise = self.layers.silent_noise if silent else self.noise
    if axes.is_norm_scale:
      factor = self._scale_factor(rest) ** powers.norm
      filler.copy(factor=factor)
    elif powers.draws and noise > 0 and axes.is_map:
      filler.copy_with_noise(rng, noise=noise, silent=silent)
    elif silent:
      filler.out[:] = 0
    else:
      filler.copy()
    filler.clear()
    is_bias = not (axes.is_map or axes.is_norm_scale or axes.has("vocab"))
    if powers.draws and not is_bias:
      filler.draw(rng, is_norm_scale=axes.is_norm_scale)
    return filler.out.reshape(rows.shape + columns.shape)

  def _scale_factor(self, axes: tuple[Axis, ...]) -> float:
    """What a norm's scale is multiplied by."""
    (axis,) = axes
    if axis.name not in self.width or self.masked:
      return 1.0
    factor = self.width[axis.name].mean_square_factor
    return 1.0 if factor is None else float(np.sqrt(factor))


class _Filler:
  """Fills a slice of a grown leaf, seen as a matrix (matrix.py).

  Args:
    own: of the layer that is copied.
    above: of the next one.
    rows: what the leaf reads, or is indexed by.
    columns: what it writes.
    dtype: of the slice.
    out: filled, where it is given.
  """

  def __init__(
    self,
    own: Float[np.ndarray, "in out"],
    above: Float[np.ndarray, "in out"],
    *,
    rows: Side,
    columns: Side,
    dtype: np.dtype,
    out: np.ndarray | None,
  ):
    self._own, self._above = own, above
    self._rows, self._columns = rows, columns
    self._wide = np.dtype(dtypes.at_least_float32(own.dtype))
    self._copier = Columns(columns)
    # Along columns only moments are divided, and these are wide.
    self._column_divisor = columns.divisor.astype(self._wide)
    shape = (rows.size, columns.size)
    self.out = np.empty(shape, dtype) if out is None else out.reshape(shape)
    assert self.out.dtype == dtype

  def copy(self, *, factor: float = 1.0) -> None:
    """Copies and divides every entry; `factor` is of a norm's scale."""
    self._copy_rows(np.arange(self._rows.size), factor=factor)

  def _copy_rows(self, places: np.ndarray, *, factor: float = 1.0) -> None:
    rows, out = self._rows, self.out
    in_order = len(places) == rows.size
    plain = factor == 1 and (self._column_divisor == 1).all()
    dtype = out.dtype if plain else self._wide
    for block in blocks(len(places), width=self._columns.size):
      here = block if in_order else places[block]
      source, divisor = rows.source[here], rows.divisor[here]
      own, above = (
        bits(divided(part, divisor, wide=self._wide, dtype=dtype))
        for part in self._parts(source)
      )
      if in_order and plain:
        self._copier.copy(own, above, into=bits(out)[here])
        continue
      part = np.empty((len(source), out.shape[1]), dtype)
      self._copier.copy(own, above, into=bits(part))
      if not plain:
        part = part * self._wide.type(factor) / self._column_divisor
      out[here] = part

  def _parts(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both layers; of the next one only where it is used."""
    own = _taken(self._own, source)
    if not self._copier.needs_above:
      return own, own
    return own, _taken(self._above, source)

  def copy_with_noise(
    self, rng: np.random.Generator, *, noise: float, silent: bool
  ) -> None:
    """Copies with noise that sums to zero over the copies of what is read.

    What has one copy has none.

    Args:
      rng: of the noise.
      noise: relative to the root mean square of the shares.
      silent: leave the shares out.
    """
    rows, out, wide = self._rows, self.out, self._wide
    order = np.argsort(np.where(rows.empty, -1, rows.source), kind="stable")
    order = order[int(rows.empty.sum()) :]
    counts = np.bincount(rows.source[order])[rows.source[order]]
    if silent:
      out[:] = 0
    else:
      # Those of one copy, and those of none.
      alone = np.concatenate([order[counts == 1], np.flatnonzero(rows.empty)])
      self._copy_rows(np.sort(alone))
    order = order[counts > 1]
    level = wide.type(noise * self._root_mean_square())
    live = (~self._columns.empty).astype(wide)
    for block in self._whole_groups(order):
      here = order[block]
      source, divisor = rows.source[here], rows.divisor[here]
      shares = np.zeros((len(here), out.shape[1]), wide)
      if not silent:
        own, above = (
          divided(part, divisor, wide=wide, dtype=wide)
          for part in self._parts(source)
        )
        self._copier.copy(own, above, into=shares)
      drawn = rng.standard_normal(shares.shape, wide)
      firsts = np.flatnonzero(np.diff(source, prepend=-1))
      sizes = np.diff(firsts, append=len(here))
      means = np.add.reduceat(drawn, firsts, axis=0)
      means /= sizes.astype(wide)[:, None]
      drawn -= np.repeat(means, sizes, axis=0)
      # Less its mean, noise of C copies has (C - 1) / C of its variance.
      whole = np.sqrt(sizes / (sizes - 1)).astype(wide)
      drawn *= level * np.repeat(whole, sizes)[:, None]
      drawn *= live  # what is written by zeros stays so
      out[here] = shares + drawn

  def _whole_groups(self, order: np.ndarray) -> Iterator[slice]:
    """Blocks of rows in which no source row's copies are torn apart."""
    start = 0
    for block in blocks(len(order), width=self._columns.size):
      stop = block.stop
      if stop < len(order):
        # To the end of the group that the block ends in.
        group = self._rows.source[order[stop - 1]]
        while stop < len(order) and self._rows.source[order[stop]] == group:
          stop += 1
      if stop > start:
        yield slice(start, stop)
      start = max(start, stop)

  def _root_mean_square(self) -> float:
    """Of the shares, over all that is copied."""
    rows, columns = self._rows, self._columns
    by_row = np.bincount(
      rows.source[~rows.empty],
      weights=rows.divisor[~rows.empty] ** -2.0,
      minlength=len(self._own),
    )
    by_column = np.bincount(
      columns.source[~columns.empty], minlength=self._own.shape[1]
    ).astype(self._wide)
    total = 0.0
    for block in blocks(*self._own.shape[:1], width=self._own.shape[1]):
      part = self._own[block].astype(self._wide)
      total += float(by_row[block] @ (np.square(part) @ by_column))
    copied = int((~rows.empty).sum()) * int((~columns.empty).sum())
    return float(np.sqrt(total / max(copied, 1)))

  def clear(self) -> None:
    """Zeros where nothing is copied."""
    for side, index in (
      (self._rows, (self._rows.empty,)),
      (self._columns, (slice(None), self._columns.empty)),
    ):
      if side.empty.any():
        self.out[index] = 0

  def draw(self, rng: np.random.Generator, *, is_norm_scale: bool) -> None:
    """Values for new entries, of the size of those that are there.

    An entry is new where its row or its column is; it stays zero where one of
    these stands on the silent side of its axis. Normal, with the root mean
    square of the source's slice; of a norm's scale its mean magnitude, since a
    scale of zero never trains what it multiplies.
    """
    rows, columns = self._rows, self._columns
    if not (rows.empty.any() or columns.empty.any()):
      return
    wide, own = self._wide, self._own.astype(self._wide, copy=False)
    if is_norm_scale:
      self.out[rows.empty[:, None] | columns.empty[None]] = np.mean(np.abs(own))
      return
    size = wide.type(np.sqrt(np.mean(np.square(own), dtype=np.float64)))
    for places, others in (
      (np.flatnonzero(rows.drawn), np.flatnonzero(~columns.zero)),
      (
        np.flatnonzero(~rows.empty),
        np.flatnonzero(columns.drawn),
      ),
    ):
      for block in blocks(len(places), width=len(others)):
        here = places[block]
        drawn = rng.standard_normal((len(here), len(others)), wide)
        self.out[np.ix_(here, others)] = size * drawn


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


def _taken(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
  return bits(values)[rows].view(values.dtype)
