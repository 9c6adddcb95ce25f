"""LiGO: a growth whose maps are learned. Its operator, and how it is applied.

An index map is a matrix of zeros and ones, and a growth by index maps a linear
map of the parameters. LiGO (Wang et al., "Learning to Grow Pretrained Models",
arXiv 2303.00980) learns those matrices on the target's loss, with the source's
parameters frozen. Every leaf is then a mixture of the source's:

  W'[l', i', j'] = sum over l, i, j of
      M_depth[l', l] M_read[i', i] M_write[j', j] W[l, i, j]

with one matrix for every dimension that grew:

  M_write  [target, source] for each width axis, of all leaves that write it
  M_read   [target, source] for each width axis, of all leaves that read it
  M_depth  [L_target, L_source] for each leaf that is stacked over layers

This is the paper's factorisation (section 3): depth apart from width, and width
as Kronecker factors for the two sides of a matrix, shared by all leaves of an
axis. Learning it is pipeline/learned_growth.py.

At first M_write is the one-hot of the axis' index map, M_read the same over the
counts, and M_depth the one-hot of the depth rule: `init_operator` is FPI with
that rule, and preserves what that preserves (scale_up.py). What has been
learned preserves nothing.

Where we differ from the paper, and from its code (VITA-Group/LiGO):
- Reads have matrices of their own. The paper ties them to the transposed write
  matrices; without counts on one side that preserves no function at the start.
- It starts as FPI, and all rows are learned. The code keeps the source as the
  first rows and learns the new ones, from random mixtures of the source.
- Heads are mixed as whole heads, by a matrix over key/value heads and one over
  the heads of a group, for RoPE ties the elements of a head to each other.
  Queries, keys and values share them as they share the axes, and so do all
  layers; the code has one for each of the three in each layer.
As there, a norm's scale is grown as what writes its axis, but in front of a
tied head, where it reads; and kernels and biases have depth matrices each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from aquila_jax.core import dtypes
from aquila_jax.core.axes import LeafAxes, Role, path_name
from aquila_jax.core.types import Leaf, Params
from aquila_jax.growth.axis_map import AxisMap, AxisMaps
from aquila_jax.growth.depth import rows_of

# Axes that no matrix may mix: RoPE pairs up the elements of a head, and the
# others are tables and stacks of things that are not alike.
_STAY = ("head_dim", "vocab", "expert")


class Operator(struct.PyTreeNode):
  """The matrices. An axis or leaf without one stays as it is."""

  writes: dict[str, Leaf]  # by axis name: float [target source]
  reads: dict[str, Leaf]  # by axis name: float [target source]
  depth: dict[str, Leaf]  # by leaf name: float [L_target L_source]

  @property
  def is_empty(self) -> bool:
    """Whether nothing grows, and so nothing can be learned."""
    return not jax.tree.leaves(self)


def init_operator(
  width: AxisMaps,
  layers: AxisMap,
  axes: Any,
  *,
  dtype: Any = jnp.float32,
) -> Operator:
  """The operator that does what FPI does with these maps.

  Args:
    width: by axis name, of every axis but `layer`. One that maps every index to
      itself gets no matrix.
    layers: of the `layer` axis; the same holds for it.
    axes: the `LeafAxes` of every parameter.
    dtype: of the matrices.

  Returns:
    The operator.
  """
  grown = {name: m for name, m in width.items() if not m.is_identity}
  assert not set(grown) & {"layer", *_STAY}, f"{sorted(grown)} cannot all grow"
  named = jax.tree_util.tree_flatten_with_path(axes)[0]
  for _, leaf in named:
    for name in grown:
      assert not leaf.has(name, Role.NEITHER), f"{name} is indexed by"
  depth_maps = {}
  if not layers.is_identity:
    depth_maps = {
      path_name(path): _of_leaf(layers, leaf)
      for path, leaf in named
      if leaf.has("layer")
    }
  return Operator(
    writes={name: _one_hot(m, dtype) for name, m in grown.items()},
    reads={
      name: _one_hot(m, dtype) / jnp.asarray(m.divisors[:, None], dtype)
      for name, m in grown.items()
    },
    depth={name: _one_hot(m, dtype) for name, m in depth_maps.items()},
  )


def _of_leaf(layers: AxisMap, source: LeafAxes) -> AxisMap:
  """The map of depth for the rows of a leaf that some layers may lack."""
  if source.layers is None:
    return layers
  (having,) = np.nonzero(np.isin(layers.source, source.layers))
  return rows_of(layers, tuple(having.tolist()))


def _one_hot(axis_map: AxisMap, dtype: Any) -> Float[Array, "target source"]:
  """1 where the target index copies the source index."""
  source = jnp.asarray(axis_map.source)
  return jax.nn.one_hot(source, axis_map.source_size, dtype=dtype)


def split_copies(
  operator: Operator, width: AxisMaps, *, scale: float, key: jax.Array
) -> Operator:
  """Makes the copies of an index differ without a change of the function.

  Copies that are equal get equal gradients, and a learned operator would keep
  them equal: it could reach nothing but a source of other values, grown by FPI.
  So the rows of a read matrix that belong to copies of one source index get
  noise that sums to zero. What they read is equal at first, and the noise
  cancels, as in HyperCloning (arXiv 2409.12903); what is exact stays exact.

  Args:
    operator: of `init_operator`.
    width: the maps that it was made from.
    scale: the norm of the noise of a row, as a share of the row's.
    key: of the noise.

  Returns:
    The operator with other read matrices; an index of one copy keeps its row.
  """
  reads = {}
  for number, name in enumerate(sorted(operator.reads)):
    matrix, copies = operator.reads[name], width[name]
    own = jax.random.fold_in(key, number)
    noise = jax.random.normal(own, matrix.shape, matrix.dtype)
    counts = jnp.asarray(copies.divisors[:, None], matrix.dtype)
    sums = jax.ops.segment_sum(noise, copies.source, copies.source_size)
    noise = noise - sums[copies.source] / counts
    size = scale / math.sqrt(copies.source_size)
    reads[name] = matrix + size * noise / counts
  return operator.replace(reads=reads)


def apply_operator(operator: Operator, params: Params, axes: Any) -> Params:
  """Grows every leaf, by a product with one matrix after another.

  It can be jitted, and differentiated in both arguments.

  Args:
    operator: of `init_operator`, learned or not.
    params: the source's, or anything of the same structure that grows as they
      do, such as their moving average.
    axes: the `LeafAxes` of every parameter.

  Returns:
    The target's parameters, computed in at least float32, in the source's
    dtypes.
  """

  def grow(path, leaf, leaf_axes):
    # At least float32: half precision would round each of the products.
    dtype = dtypes.at_least_float32(leaf.dtype)
    grown = leaf.astype(dtype)
    for dim, matrix in _products(operator, path_name(path), leaf_axes):
      grown = _multiply(matrix.astype(dtype), grown, dim=dim)
    return grown.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(grow, params, axes)


def _products(
  operator: Operator, name: str, axes: LeafAxes
) -> list[tuple[int, Any]]:
  """The dimensions of a leaf that grow and their matrices, cheapest order.

  A product along a dimension of s to t costs (elements so far) * t. Of two
  neighbours, exchanging them pays where the second's 1 / s - 1 / t is smaller:
  large dimensions that grow little first, and so the layers last.
  """
  found = []
  for dim, axis in enumerate(axes.axes):
    by_role = {Role.READS: operator.reads, Role.WRITES: operator.writes}
    matrix = by_role.get(axis.role, {}).get(axis.name)
    if axis.name == "layer":
      matrix = operator.depth.get(name)
    if matrix is not None:
      found.append((dim, matrix))
  return sorted(found, key=lambda item: _expense(*item[1].shape))


def _expense(target: int, source: int) -> float:
  return 1 / source - 1 / target


def _multiply(
  matrix: Float[Array, "target source"], leaf: Float[Array, "..."], *, dim: int
) -> Float[Array, "..."]:
  """Replaces dimension `dim` of a leaf by its product with a matrix."""
  letters = "abcdefgh"[: leaf.ndim]
  old = letters[dim]
  return jnp.einsum(
    f"z{old},{letters}->{letters.replace(old, 'z')}",
    matrix,
    leaf,
    # Accelerators else multiply float32 in bfloat16 or TF32, and a one-hot
    # matrix would round what it copies.
    precision=jax.lax.Precision.HIGHEST,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorFlops:
  """A multiply and an add each, of the products alone."""

  forward: float
  # To the operator, not to the source: the first product of a leaf hands no
  # gradient on.
  backward: float


def operator_flops(
  operator: Operator, params: Params, axes: Any
) -> OperatorFlops:
  """What it takes to grow all leaves once, and to differentiate that.

  Args:
    operator: or its shapes.
    params: the source's, or their shapes.
    axes: the `LeafAxes` of every parameter.

  Returns:
    The FLOPs; of a training step both together.
  """
  forward, backward = 0.0, 0.0
  for (path, leaf), leaf_axes in zip(
    jax.tree_util.tree_flatten_with_path(params)[0],
    jax.tree.leaves(axes),
    strict=True,
  ):
    matrices = _products(operator, path_name(path), leaf_axes)
    costs = _costs(leaf.shape, matrices)
    forward += sum(costs)
    backward += 2 * sum(costs) - sum(costs[:1])
  return OperatorFlops(forward=forward, backward=backward)


def _costs(
  shape: Sequence[int], matrices: Sequence[tuple[int, Any]]
) -> list[float]:
  """The FLOPs of each product of a leaf."""
  sizes, costs = list(shape), []
  for dim, matrix in matrices:
    costs.append(2.0 * math.prod(sizes) * matrix.shape[0])
    sizes[dim] = matrix.shape[0]
  return costs
