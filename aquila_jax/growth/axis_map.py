"""The one primitive of growth: index maps on named axes.

A map g says of every target index of an axis which source index it copies;
C_k is how many target indices copy k. For y = x W, W [in, out]:

  W writes the axis (out)   copy              W'[:, j] = W[:, g(j)]
  W reads the axis (in)     copy and divide   W'[i, :] = W[g(i), :] / C_g(i)
  neither (a table, layers) copy

With one map for each axis name of the whole network, x' = x[g] everywhere, and
every product is what it was: sum_i x'[i] W'[i, j] = sum_k x[k] W[k, g(j)]. That
is FPI (bert2BERT, arXiv 2110.07143, section 3.2); every other method changes
which maps are used, whose values a map takes, or what is added to the shares.

A target index may also copy nothing (`EMPTY`): a residual padded with zeros, a
neuron that is new. Its entries are zero on one side of the axis, so that it
adds nothing, and drawn on the other, so that it trains.

An RMSNorm divides by the root of a mean, which feels the size of the axis: with
every source index copied c times, mean(x'^2) = mean(x^2) c D_src / D_tgt. Its
scale is multiplied by the root of that factor, and its epsilon must be by the
factor (LEMON, arXiv 2310.07999). Uneven counts have no such factor.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Bool, Int

from aquila_jax.core.axes import Role
from aquila_jax.core.lineage import copy_runs

EMPTY = -1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AxisMap:
  """g: for every target index of one axis, the source index it copies."""

  source: Int[np.ndarray, " target"]  # EMPTY copies nothing
  source_size: int
  rule: str = "given"  # in a word
  # The side on which the entries of an EMPTY index are zero. None: on neither,
  # and the function changes unless the index is masked.
  silent: Role | None = None

  def __post_init__(self):
    inside = (self.source >= EMPTY) & (self.source < self.source_size)
    assert inside.all(), "a target index copies what is not there"

  @property
  def target_size(self) -> int:
    return len(self.source)

  @functools.cached_property
  def counts(self) -> Int[np.ndarray, " source"]:
    """C: how many target indices copy each source index."""
    return np.bincount(self.source[~self.is_empty], minlength=self.source_size)

  @functools.cached_property
  def divisors(self) -> Int[np.ndarray, " target"]:
    """C_g(i) of every target index i; 1 where it copies nothing."""
    return np.where(self.is_empty, 1, self.counts[self.source])

  @property
  def is_empty(self) -> Bool[np.ndarray, " target"]:
    return self.source == EMPTY

  @property
  def has_empty(self) -> bool:
    return bool(self.is_empty.any())

  @property
  def is_identity(self) -> bool:
    return self.target_size == self.source_size and bool(
      (self.source == np.arange(self.source_size)).all()
    )

  @property
  def unused(self) -> list[int]:
    """The source indices that are copied nowhere."""
    return np.flatnonzero(self.counts == 0).tolist()

  @functools.cached_property
  def is_new(self) -> Bool[np.ndarray, " target"]:
    """False for the first copy of every source index, True for the others."""
    new = np.ones(len(self.source), bool)
    places = np.flatnonzero(~self.is_empty)
    firsts = np.unique(self.source[places], return_index=True)[1]
    new[places[firsts]] = False
    return new

  @property
  def new_ranges(self) -> list[list[int]]:
    """The new indices as half-open ranges, for lineage.Event.new_indices."""
    edges = np.flatnonzero(np.diff([0, *self.is_new.astype(int), 0]))
    return edges.reshape(-1, 2).tolist()

  @property
  def mean_square_factor(self) -> float | None:
    """mean(x'^2) / mean(x^2), the same for every x; None where it is not."""
    first = int(self.counts[0])
    if (self.counts != first).any():
      return None
    return first * self.source_size / self.target_size

  def in_words(self) -> str:
    """Sizes and counts, for people: `8 -> 20 (circular): 4 x3, 4 x2`."""
    words = f"{self.source_size} -> {self.target_size} ({self.rule})"
    values, times = np.unique(self.counts, return_counts=True)
    parts = [
      f"{n} copied {_times(c)}"
      for c, n in zip(values.tolist(), times.tolist(), strict=True)
    ][::-1]
    if self.has_empty:
      side = {
        Role.WRITES: ", written by zeros",
        Role.READS: ", read by zeros",
        None: "",
      }[self.silent]
      parts.append(f"{int(self.is_empty.sum())} new{side}")
    return f"{words}: {', '.join(parts)}"


def _times(count: int) -> str:
  return {1: "once", 2: "twice"}.get(count, f"{count} times")


AxisMaps = Mapping[str, AxisMap]


def copies(maps: AxisMaps) -> dict[str, list[list[int]]]:
  """The maps by axis name in runs, for lineage.Event.copies."""
  return {name: copy_runs(m.source, m.divisors) for name, m in maps.items()}


def circular(source_size: int, target_size: int) -> AxisMap:
  """g(i) = i mod source_size; equal counts at an integer factor."""
  return AxisMap(
    source=np.arange(target_size) % source_size,
    source_size=source_size,
    rule="circular",
  )


def random(
  source_size: int, target_size: int, *, name: str, seed: int
) -> AxisMap:
  """The source first, then indices drawn evenly from it (bert2BERT, eq. 3).

  Args:
    source_size: of the axis.
    target_size: of the axis.
    name: of the axis; a part of the seed, as in no two axes the same draw.
    seed: of the growth.

  Returns:
    The map.
  """
  generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
  drawn = generator.integers(0, source_size, target_size - source_size)
  return AxisMap(
    source=np.concatenate([np.arange(source_size), drawn]),
    source_size=source_size,
    rule="random",
  )


def padded(
  source_size: int, target_size: int, *, silent: Role | None
) -> AxisMap:
  """The source first, then indices that copy nothing."""
  source = np.arange(target_size)
  return AxisMap(
    source=np.where(source < source_size, source, EMPTY),
    source_size=source_size,
    rule="padded",
    silent=silent,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
  """How a tree shaped as the parameters goes along with them.

  The powers of the counts that it is divided by, along axes of a role, and of
  the factor that norm scales are multiplied by.
  """

  reads: int
  writes: int
  norm: int
  # Whether new entries and noise are drawn; what follows gradients has zeros.
  draws: bool

  def of(self, role: Role) -> int:
    return {Role.READS: self.reads, Role.WRITES: self.writes}.get(role, 0)


# Adam's moments have powers of their own: optimizer_state.py.
PARAMETERS = Powers(reads=1, writes=0, norm=1, draws=True)


def axis_sizes(axes: object, shapes: object) -> dict[str, int]:
  """The size of every axis name that a tree of leaves declares.

  Args:
    axes: the `LeafAxes` of every leaf.
    shapes: the same tree of anything with a `shape`.

  Returns:
    Size by axis name. One name has one size in a whole network; `layer` that
    of the leaves that all layers have.
  """
  sizes: dict[str, int] = {}
  for leaf_axes, leaf in zip(
    jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True
  ):
    for name, size in zip(leaf_axes.names, leaf.shape, strict=True):
      if name == "layer" and leaf_axes.layers is not None:
        continue
      assert sizes.setdefault(name, size) == size, name
  return sizes
