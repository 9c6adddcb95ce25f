"""An upcycled tree, read slice by slice; nothing of it is held.

As grown_tree.py, for Scale-Out: a leaf with the axis `expert` takes the hidden
units of what its expert copies, a leaf that writes `expert` is the router's,
one of a shared expert copies an FFN, and all else is the source's.

Adam's moments. Let an FFN's output be multiplied by C in an expert, of which
the kernel has the factor c, and let the expert meet a share p of the tokens
with a mean weight w. With d_t the gradient of token t for the kernel of the
dense FFN, the expert's gradient is the sum of w C / c * d_t over its tokens.
Its mean is the dense one times p w C / c, and its square, where the tokens' d_t
are mostly noise, the dense one times p (w C / c)^2:

  mu' = mu p (w C / c)        nu' = nu p (w C / c)^2

(Were there no noise, nu' would be nu p^2 (w C / c)^2.) For E copies of which a
token meets A with gates near 1 / A that is mu / E and nu / (A E). Measured on a
longer quickstart, E = 8 and A = 2: 0.057 to 0.058 of the dense mean square,
where 1 / (A E) is 0.0625 and 1 / E^2 0.0156 (benchmarks/upcycled_moments.py).
What is drawn has no past, and zeros.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from aquila_jax.core import dtypes
from aquila_jax.core.axes import Role
from aquila_jax.growth.grown_tree import Index, LeafSpec, Recent, Tree
from aquila_jax.growth.layer_kinds import dense_index, dense_leaf
from aquila_jax.growth.matrix import blocks
from aquila_jax.growth.upcycling import Parent, Upcycling

# Trees whose values are of parameters, and the power of a factor in the others.
_VALUES = ("params", "ema")
_POWER = {"mu": 1, "nu": 2}


class UpcycledTree:
  """A tree of a model, upcycled.

  Args:
    sources: the tree of the source, and those of the models mixed in.
    upcycling: what every FFN is made of.
    role: of the tree: "params", "ema", "mu" or "nu".
    leaves: of the target, by name.
    kernels: the name of each kernel of an FFN in the source, by its last part.
    rows: the router's, one for each copy; None where the source has a router.
    constants: of `Upcycling.routed_scale`.
    seed: of what is drawn.
    prefix: of the names in the sources.
    values: the parameters' trees, whose statistics what is drawn has; of an
      average, which is to have the same. None: these trees.
  """

  def __init__(
    self,
    sources: Sequence[Tree],
    upcycling: Upcycling,
    *,
    role: str,
    leaves: Mapping[str, LeafSpec],
    kernels: Mapping[str, str],
    rows: Float[np.ndarray, "L D copies"] | None,
    constants: Float[np.ndarray, "L"] | None,
    seed: int,
    prefix: str = "",
    values: Sequence[Tree] | None = None,
  ):
    self._sources = [Recent(tree) for tree in sources]
    self._values = None if values is None else [Recent(t) for t in values]
    self._up = upcycling
    self._role = role
    self._leaves = leaves
    self._kernels = kernels
    self._rows = rows
    self._scale = upcycling.routed_scale(constants)
    self._seed = seed
    self._prefix = prefix

  def read(self, name: str, *, index: Index = ()) -> np.ndarray:
    """One of the `slices` of a leaf, in the target's dtype."""
    spec, shared = self._leaves[name], self._up.shared
    if spec.axes.has("expert", Role.WRITES):
      value = self._router(name, spec, index)
    elif spec.axes.has("expert"):
      value = self._expert(name, spec, index)
    elif shared is not None and spec.axes.has("shared_mlp"):
      value = self._shared(name, spec, index)
    elif shared is not None and spec.axes.has("shared_expert"):
      value = np.zeros(spec.shape[1:])  # sigmoid(0) = 1/2 for every token
    else:
      value = self._kept(name, spec, index)
    return value.astype(spec.dtype, copy=False)

  def _kept(self, name: str, spec: LeafSpec, index: Index) -> np.ndarray:
    """The source's; of several models their mean."""
    if self._up.of_source is None:
      name, index = dense_leaf(name), dense_index(spec.axes, index)
    parts = [t.read(self._prefix + name, index=index) for t in self._sources]
    if len(parts) == 1:
      return parts[0]
    return np.mean(np.stack(parts), axis=0, dtype=_wide(parts[0].dtype))

  def _router(self, name: str, spec: LeafSpec, index: Index) -> np.ndarray:
    up = self._up
    if up.of_source is not None:
      same = up.together
      value = self._sources[0].read(self._prefix + name, index=index)
      value = np.repeat(value, same, axis=-1)
      if spec.axes.is_selection_bias:
        # Of softmax over all experts the scores are smaller by as much.
        smaller = up.moe.router_order == "softmax_then_topk"
        return value / same if smaller else value
      # The copies share the gradient of one.
      return value / same ** _POWER.get(self._role, 0)
    if self._role not in _VALUES or spec.axes.is_selection_bias:
      return np.zeros(spec.shape[1:])
    assert self._rows is not None
    return np.repeat(self._rows[index[0]], up.shards, axis=-1)

  def _shared(self, name: str, spec: LeafSpec, index: Index) -> np.ndarray:
    up, shared = self._up, self._up.shared
    assert shared is not None
    dim = _unstacked(spec).index("shared_mlp")
    reads_mlp = spec.axes.has("shared_mlp", Role.READS)
    layer = spec.axes.layer_of(index[0])
    value = self._ffn(self._sources[0], name, (layer, ...))
    value = _units(value, shared.units, dim)
    c = up.kernel_scale(up.shared_scale, reads_mlp=reads_mlp)
    return self._scaled(
      value, c, dtype=spec.dtype, meets=1.0, weight=shared.share
    )

  def _expert(self, name: str, spec: LeafSpec, index: Index) -> np.ndarray:
    up, moe = self._up, self._up.moe
    row, expert = index[0], index[1]
    parent = up.parent(expert)
    dim = _unstacked(spec).index("mlp")
    reads_mlp = spec.axes.has("mlp", Role.READS)
    stored = (spec.axes.layer_of(row), ...)
    if parent.expert is not None:
      stored = (row, parent.expert, ...)
    value = self._cut(self._sources, parent, name, stored, dim)
    if up.is_changed(expert) and (up.redraw or up.noise):
      like = value
      if self._values is not None:
        like = self._cut(self._values, parent, name, stored, dim)
      value = self._changed(value, like, dim, name=name, place=(row, expert))
    c = up.kernel_scale(float(self._scale[row]), reads_mlp=reads_mlp)
    meets = moe.top_k / moe.num_experts
    weight = up.routed_share * up.shards / moe.top_k
    old = up.of_source
    if old is not None:
      meets *= old.num_experts / old.top_k
      weight *= old.top_k
    return self._scaled(value, c, dtype=spec.dtype, meets=meets, weight=weight)

  def _cut(
    self,
    trees: Sequence[Recent],
    parent: Parent,
    name: str,
    index: Index,
    dim: int,
  ) -> np.ndarray:
    """The hidden units of a kernel that an expert comes from."""
    value = self._ffn(trees[parent.model], name, index)
    return _units(value, parent.units, dim)

  def _ffn(self, tree: Recent, name: str, index: Index) -> np.ndarray:
    kernel = self._kernels[name.rpartition(".")[2]]
    return tree.read(self._prefix + kernel, index=index)

  def _scaled(
    self,
    value: np.ndarray,
    c: float,
    *,
    dtype: np.dtype,
    meets: float,
    weight: float,
  ) -> np.ndarray:
    """A kernel times its factor, or a moment times what follows from it.

    Args:
      value: of the source.
      c: the kernel's factor.
      dtype: of the target.
      meets: p, the share of the tokens that it meets, of those that its source
        meets.
      weight: w C, of the same.
    """
    factor = c
    if self._role not in _VALUES:
      factor = meets * (weight / c) ** _POWER[self._role]
    if factor == 1:
      return value
    # Some rows at once: in a wide dtype the whole would be twice as large.
    scaled = np.empty(value.shape, dtype)
    for rows in blocks(len(value), width=value.shape[1]):
      scaled[rows] = value[rows] * np.asarray(factor, _wide(value.dtype))
    return scaled

  def _changed(
    self,
    value: np.ndarray,
    like: np.ndarray,
    dim: int,
    *,
    name: str,
    place: tuple[int, int],
  ) -> np.ndarray:
    """With units drawn anew and noise added.

    Drop-Upcycling (arXiv 2502.19261, section 3): units are chosen, and their
    values drawn from a normal distribution with the mean and the standard
    deviation of those that they replace.
    """
    up = self._up
    value = np.array(value, _wide(value.dtype))
    rng = self._generator(name, *place)
    if up.noise and self._role in _VALUES:
      deviation = up.noise * float(np.std(like, dtype=value.dtype))
      for rows in blocks(len(value), width=value.shape[1]):
        part = value[rows]
        noise = deviation * rng.standard_normal(part.shape, np.float32)
        part += noise * (rng.random(part.shape, np.float32) < up.noise_share)
    if up.redraw:
      together = "units" if up.redraw_together else name
      size = value.shape[dim]
      chosen = self._generator(together, *place).choice(
        size, round(up.redraw * size), replace=False
      )
      units = (slice(None),) * dim + (np.sort(chosen),)
      if self._role in _VALUES:
        old = like[units].astype(value.dtype)
        drawn = rng.standard_normal(old.shape, np.float32)
        value[units] = old.mean() + old.std() * drawn
      else:
        value[units] = 0
    return value

  def _generator(self, what: str, *place: int) -> np.random.Generator:
    return np.random.default_rng(
      (self._seed, zlib.crc32(what.encode()), *place)
    )


def _unstacked(spec: LeafSpec) -> list[str]:
  """The axes of a slice."""
  return [
    axis.name for axis in spec.axes.axes if axis.name not in ("layer", "expert")
  ]


def _units(value: np.ndarray, units: slice, dim: int) -> np.ndarray:
  return value[(slice(None),) * dim + (units,)]


def _wide(dtype: np.dtype) -> np.dtype:
  return np.dtype(dtypes.at_least_float32(dtype))


class MergedTree:
  """A tree of a mixture whose experts become one FFN.

  Args:
    source: the tree of the mixture.
    weights: of every expert in every layer; they sum to one.
    leaves: of the target, by name.
    old: those of the mixture.
    experts: the name of each kernel of the experts, by its last part.
    shared: likewise of a shared expert, whose units come first; None where
      there is none.
  """

  def __init__(
    self,
    source: Tree,
    weights: Float[np.ndarray, "L E"],
    *,
    leaves: Mapping[str, LeafSpec],
    old: Mapping[str, LeafSpec],
    experts: Mapping[str, str],
    shared: Mapping[str, str] | None,
  ):
    self._source = source
    self._weights = weights
    self._leaves = leaves
    self._old = old
    self._dense = {
      name.rpartition(".")[2]: name
      for name, spec in old.items()
      if spec.axes.has("dense_mlp")
    }
    self._experts = experts
    self._shared = shared

  def read(self, name: str, *, index: Index = ()) -> np.ndarray:
    """One of the `slices` of a leaf, in the target's dtype."""
    spec = self._leaves[name]
    if not spec.axes.has("mlp"):
      value = self._source.read(name, index=index)
      return value.astype(spec.dtype, copy=False)
    last = name.rpartition(".")[2]
    row = self._old[self._experts[last]].axes.row_of(index[0])
    if row is None:  # a layer that has an FFN already
      kept = self._dense[last]
      row = self._old[kept].axes.row_of(index[0])
      value = self._source.read(kept, index=(row, ...))
      return value.astype(spec.dtype, copy=False)
    total = np.zeros(())
    for expert, weight in enumerate(self._weights[row]):
      part = self._source.read(self._experts[last], index=(row, expert, ...))
      total = total + part.astype(_wide(part.dtype)) * weight
    if self._shared is not None:
      part = self._source.read(self._shared[last], index=(row, ...))
      dim = _unstacked(spec).index("mlp")
      total = np.concatenate([part.astype(total.dtype), total], axis=dim)
    return total.astype(spec.dtype, copy=False)
