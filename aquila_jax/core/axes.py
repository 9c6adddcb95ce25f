"""Named axes with a direction: the declaration that carries the framework.

Every parameter leaf names each of its dimensions and says whether the leaf
*reads from* that dimension (its input), *writes to* it (its output), or
neither (a table index or a stack). Sharding, Scale-Up, Scale-Out, the growth
of optimizer moments and parameter counts are all derived from it; none of
them looks at a parameter's path.

Legend of axis letters, the same in annotations, einsums and comments:

  B  batch                         N  query heads (N = K * G)
  T  query tokens                  K  key/value heads
  S  key/value tokens              G  query heads per key/value head
  D  model width ("embed")         H  head width
  V  vocabulary                    F  hidden width of an MLP or expert
  L  layers                        E  experts
  M  tokens, flattened (B * T)     A  experts chosen per token
  R  routed rows (M * A)           C  slots per expert
  P  blocks of rows that belong to one expert
  Q  rows per block

Logical axis names are words: embed, kv_head, q_per_kv, head_dim, mlp, expert,
vocab, layer; dense_mlp is the hidden width of the FFNs that layers without
experts have where others have experts; shared_mlp and shared_expert are of the
expert that every token meets beside the routed ones: its hidden width, and how
many gates it has.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import struct

# The only logical axis names; sharding rules and index maps speak of these.
AXIS_NAMES = (
  "layer",
  "vocab",
  "embed",
  "kv_head",
  "q_per_kv",
  "head_dim",
  "mlp",
  "expert",
  "dense_mlp",
  "shared_mlp",
  "shared_expert",
)


class Role(enum.Enum):
  """What a leaf does with a dimension: its direction."""

  READS = "reads"
  WRITES = "writes"
  NEITHER = "neither"


@dataclasses.dataclass(frozen=True)
class Axis:
  """One dimension of a parameter leaf: a logical name and a direction."""

  name: str
  role: Role

  def __post_init__(self):
    if self.name not in AXIS_NAMES:
      raise ValueError(f"axis name {self.name!r} is not one of {AXIS_NAMES}")

  def __str__(self) -> str:
    return f"{self.role.value} {self.name}"


def reads(name: str) -> Axis:
  """An axis that the leaf contracts over."""
  return Axis(name, Role.READS)


def writes(name: str) -> Axis:
  """An axis that the leaf produces."""
  return Axis(name, Role.WRITES)


def neither(name: str) -> Axis:
  """An axis that the leaf is indexed by or stacked along."""
  return Axis(name, Role.NEITHER)


@dataclasses.dataclass(frozen=True)
class LeafAxes:
  """The axes of one parameter leaf, one `Axis` a dimension, in order.

  Not a pytree node, so that a tree of `LeafAxes` has the structure of the
  parameters it describes.
  """

  axes: tuple[Axis, ...]
  # Multiplies what was divided by its root mean square over the leaf's own
  # axis: the scale of an RMSNorm. What such a scale must be depends on the
  # size of the axis, and a zero in it never trains what it multiplies.
  is_norm_scale: bool = False
  # Of the model, those whose rows the `layer` axis has, rising. None is all:
  # row i is of layer i.
  layers: tuple[int, ...] | None = None
  # Added to scores when experts are chosen, and to nothing else: no loss has a
  # gradient in it. The training step moves it by a rule of its own, and no
  # optimizer does.
  is_selection_bias: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(axis.name for axis in self.axes)

  def index(self, name: str) -> int | None:
    """The dimension called `name`, or None where the leaf has none."""
    return self.names.index(name) if name in self.names else None

  def has(self, name: str, role: Role | None = None) -> bool:
    """Whether a dimension is called `name` (and has `role`, if given)."""
    return any(
      axis.name == name and role in (None, axis.role) for axis in self.axes
    )

  def layer_of(self, row: int) -> int:
    """The layer of the model that a row of the `layer` axis is of."""
    return row if self.layers is None else self.layers[row]

  def row_of(self, layer: int) -> int | None:
    """The row of a layer of the model, or None where the leaf has none."""
    if self.layers is None:
      return layer
    return self.layers.index(layer) if layer in self.layers else None

  @property
  def is_map(self) -> bool:
    """Whether the leaf reads an axis and writes one: a matrix, no vector."""
    roles = {axis.role for axis in self.axes}
    return {Role.READS, Role.WRITES} <= roles

  def __str__(self) -> str:
    return ", ".join(str(axis) for axis in self.axes)


class Declared(nn.meta.AxisMetadata, struct.PyTreeNode):
  """The box in which a module hands a parameter and its axes to Linen.

  `nn.scan` calls `add_axis` when it stacks layers; `nn.scan` over blocks is
  given the axis name in `metadata_params`.
  """

  value: Any
  axes: tuple[Axis, ...] = struct.field(pytree_node=False)
  is_norm_scale: bool = struct.field(pytree_node=False, default=False)
  # See LeafAxes; set by a module that stacks some of the layers.
  layers: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
  is_selection_bias: bool = struct.field(pytree_node=False, default=False)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> Declared:
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
    stacked = neither(params[nn.meta.PARTITION_NAME])
    axes = (*self.axes[:index], stacked, *self.axes[index:])
    return self.replace(axes=axes)

  def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
    del params
    return self.replace(axes=self.axes[:index] + self.axes[index + 1 :])


Initializer = Callable[..., jax.Array]


def declare(
  init: Initializer,
  axes: Sequence[Axis],
  *,
  is_norm_scale: bool = False,
  is_selection_bias: bool = False,
) -> Callable[..., Any]:
  """Wraps an initializer so that the parameter it makes declares `axes`.

  Args:
    init: `init(key, shape, dtype)`, as in `jax.nn.initializers`.
    axes: one `Axis` for every dimension of the shape it will be called with.
    is_norm_scale: see `LeafAxes`.
    is_selection_bias: see `LeafAxes`.

  Returns:
    An initializer for `nn.Module.param`. It makes a `Declared`, which `param`
    unboxes, though Flax's types do not say so.

  Raises:
    ValueError: when called with a shape of another rank than `axes`.
  """
  return functools.partial(
    _declared,
    init=init,
    axes=axes,
    is_norm_scale=is_norm_scale,
    is_selection_bias=is_selection_bias,
  )


# Not a closure of `declare`: types are checked while tests run, by a wrapper
# that would be compiled anew for every parameter of every model.
def _declared(
  key: jax.Array,
  shape: Sequence[int],
  dtype: Any,
  *,
  init: Initializer,
  axes: Sequence[Axis],
  is_norm_scale: bool,
  is_selection_bias: bool,
) -> Declared:
  if len(shape) != len(axes):
    raise ValueError(
      f"shape {tuple(shape)} has {len(shape)} dimensions, declared axes are"
      f" ({', '.join(map(str, axes))})"
    )
  return Declared(
    value=init(key, shape, dtype),
    axes=tuple(axes),
    is_norm_scale=is_norm_scale,
    is_selection_bias=is_selection_bias,
  )


def _is_declared(node: Any) -> bool:
  return isinstance(node, Declared)


def split_declared(variables: Any) -> tuple[Any, Any]:
  """Splits a tree of `Declared` into plain values and a tree of `LeafAxes`."""
  values = jax.tree.map(lambda box: box.value, variables, is_leaf=_is_declared)
  axes = jax.tree.map(
    lambda box: LeafAxes(
      box.axes,
      is_norm_scale=box.is_norm_scale,
      is_selection_bias=box.is_selection_bias,
      layers=box.layers,
    ),
    variables,
    is_leaf=_is_declared,
  )
  return values, axes


def path_name(path: Sequence[Any]) -> str:
  """A leaf's path as people write it: `layers/attention/query/kernel`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
