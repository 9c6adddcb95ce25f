"""Growth from disk to disk, one layer of one leaf at a time.

The same maps and divisors as scale_up.py and scale_out.py, and the same bytes
as they give; a layer of a leaf and its copy are all that is in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.core import array_store, dtypes, model_dir
from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.experiment_config import ScaleOut, ScaleUp
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import ModelReader, ModelWriter, StoredModel
from aquila_jax.growth import scale_out, scale_up
from aquila_jax.growth.axis_map import PARAMETERS
from aquila_jax.growth.optimizer_state import FIRST_MOMENT, SECOND_MOMENT
from aquila_jax.growth.scale_up import Growth
from aquila_jax.models import decoder_lm

Progress = Callable[[str], None]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
  """A leaf of one of the trees of a MODEL, on its way."""

  source: array_store.TreeReader
  name: str  # in its tree
  axes: LeafAxes
  shape: tuple[int, ...]  # of the target
  dtype: jnp.dtype  # of the target
  role: str  # "params", "ema", "mu" or "nu"

  def read(self, index: Index = ()) -> np.ndarray:
    return self.source.read(self.name, index=index)

  @property
  def num_layers(self) -> int | None:
    """Of the target, where the leaf is stacked over layers."""
    return self.shape[0] if self.axes.has("layer") else None


# Yields leaf[index] of the target; together they fill the leaf.
Slices = Callable[[_Leaf], Iterator[tuple[Index, Any]]]


def stream_scale_up(
  source: ModelReader,
  output: str | os.PathLike[str],
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
  progress: Progress,
) -> StoredModel:
  """`scale_up` of a MODEL directory into another.

  Args:
    source: of `model_dir.open_model`.
    output: the directory to write; it must not exist.
    target: the architecture to grow into.
    options: as for `scale_up`; any method but random, which reads nothing.
    seed: of random width maps.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.
    progress: told how far it is.

  Returns:
    The grown model, with shapes for parameters.

  Raises:
    errors.UserError: as `scale_up`, or where the source is damaged.
  """
  assert options.method != "random"
  config = source.model.config
  growth = scale_up.make_growth(config, target, options, seed=seed, path=path)
  stored = scale_up.grown_header(
    source.model, target, options, seed=seed, name=name, path=path
  )
  return _stream(
    source,
    output,
    stored,
    slices=functools.partial(_grown_slices, growth=growth),
    keep_moments=options.optimizer == "grow",
    progress=progress,
  )


def stream_scale_out(
  source: ModelReader,
  output: str | os.PathLike[str],
  target: ModelConfig,
  options: ScaleOut,
  *,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
  progress: Progress,
) -> StoredModel:
  """`scale_out` of a MODEL directory into another.

  Args:
    source: of `model_dir.open_model`.
    output: the directory to write; it must not exist.
    target: the source's architecture with `moe`.
    options: as for `scale_out`.
    seed: of the router.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.
    progress: told how far it is.

  Returns:
    The mixture, with shapes for parameters.

  Raises:
    errors.UserError: as `scale_out`, or where the source is damaged.
  """
  stored = scale_out.grown_header(
    source.model, target, options, seed=seed, name=name, path=path
  )
  return _stream(
    source,
    output,
    stored,
    slices=functools.partial(_expert_slices, target=target, seed=seed),
    keep_moments=options.optimizer == "grow",
    progress=progress,
  )


_POWERS = {
  "params": PARAMETERS,
  "ema": PARAMETERS,
  "mu": FIRST_MOMENT,
  "nu": SECOND_MOMENT,
}


def _grown_slices(
  leaf: _Leaf, *, growth: Growth
) -> Iterator[tuple[Index, Any]]:
  powers = _POWERS[leaf.role]
  if leaf.num_layers is None:
    whole = jax.jit(
      functools.partial(growth.leaf, axes=leaf.axes, powers=powers)
    )
    yield (), whole(leaf.read())
    return
  grow = growth.layer(leaf.axes, powers=powers)
  for layer in range(leaf.num_layers):
    own, above = growth.source_layers(layer)
    value = leaf.read((own,))
    same = above == own or not growth.from_next_layer
    yield (layer,), grow(value, value if same else leaf.read((above,)))


def _expert_slices(
  leaf: _Leaf, *, target: ModelConfig, seed: int
) -> Iterator[tuple[Index, Any]]:
  moe = target.moe
  assert moe is not None
  if leaf.axes.has("expert", Role.WRITES):
    if leaf.role in ("mu", "nu"):
      yield (), np.zeros(leaf.shape, leaf.dtype)
      return
    # In the dtype of the parameters, also for the average of them.
    shape = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(target.param_dtype))
    draw = jax.jit(scale_out.router_init(moe, seed=seed), static_argnums=0)
    yield (), draw(shape)
    return
  divisor = scale_out.moment_divisors(moe).get(leaf.role, 1)
  layers = [()] if leaf.num_layers is None else np.ndindex(leaf.num_layers)
  for index in layers:
    value = leaf.read(index)
    if not leaf.axes.has("expert"):
      yield index, value
      continue
    assert leaf.axes.names[len(index)] == "expert", leaf.axes
    value = value / np.asarray(divisor, value.dtype)
    for expert in range(moe.num_experts):
      yield (*index, expert), value


def _stream(
  source: ModelReader,
  output: str | os.PathLike[str],
  stored: StoredModel,
  *,
  slices: Slices,
  keep_moments: bool,
  progress: Progress,
) -> StoredModel:
  optimizer = source.optimizer if keep_moments else None
  with model_dir.writing(
    output,
    stored,
    axes=decoder_lm.parameter_axes(stored.config),
    with_optimizer=optimizer is not None,
    with_ema=source.ema is not None,
  ) as writer:
    leaves = list(_leaves(source, writer, stored.config))
    for number, (leaf, tree) in enumerate(leaves, 1):
      for index, value in slices(leaf):
        part = np.asarray(value).astype(leaf.dtype, copy=False)
        tree.write(leaf.name, part, index=index)
      progress(f"{number} of {len(leaves)} leaves: {leaf.role} {leaf.name}")
    if writer.optimizer is not None:
      assert optimizer is not None
      writer.optimizer.write("count", optimizer.read("count"))
  return stored


def _leaves(
  source: ModelReader, writer: ModelWriter, target: ModelConfig
) -> Iterator[tuple[_Leaf, array_store.TreeWriter]]:
  """Every leaf of the target that is grown, and where it is written."""
  shapes = jax.tree_util.tree_flatten_with_path(
    decoder_lm.abstract_params(target)
  )[0]
  axes = jax.tree.leaves(decoder_lm.parameter_axes(target))
  trees = [("params", source.params, writer.params)]
  if source.ema is not None and writer.ema is not None:
    trees.append(("ema", source.ema, writer.ema))
  if source.optimizer is not None and writer.optimizer is not None:
    trees += [(m, source.optimizer, writer.optimizer) for m in ("mu", "nu")]
  for role, reader, tree in trees:
    for (path, shape), leaf_axes in zip(shapes, axes, strict=True):
      name = ".".join(entry.key for entry in path)
      wide = dtypes.at_least_float32(shape.dtype)
      yield (
        _Leaf(
          source=reader,
          name=f"{role}.{name}" if role in ("mu", "nu") else name,
          axes=leaf_axes,
          shape=shape.shape,
          dtype=jnp.dtype(shape.dtype) if role == "params" else wide,
          role=role,
        ),
        tree,
      )
