"""Growth from disk to disk, one slice of one leaf at a time.

The same maps and divisors as scale_up.py and scale_out.py, and the same bytes
as they give. A slice is one layer (of one expert) of a leaf, or 8,192 rows of a
vocabulary; a few of these and their copies are all that is in memory.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.core import array_store, model_dir
from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import ScaleOut, ScaleUp
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import ModelReader, ModelWriter, StoredModel
from aquila_jax.growth import grown_tree, scale_out, scale_up
from aquila_jax.growth.exactness import Check
from aquila_jax.growth.grown_tree import GrownTree, Index, LeafSpec
from aquila_jax.models import decoder_lm

Progress = Callable[[str], None]

# Slices on their way at the same time: one is read, one grown, one written.
_AT_ONCE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
  """A leaf of one of the trees of a MODEL, on its way."""

  role: str  # of the tree: "params", "ema", "mu" or "nu"
  name: str  # in the parameters
  spec: LeafSpec  # of the target

  @property
  def prefix(self) -> str:
    """Before its name on disk: both moments lie in one tree."""
    return _PREFIX.get(self.role, "")


_PREFIX = {"mu": "mu.", "nu": "nu."}

# Yields (index, value) of the target; together they fill the leaf.
Slices = Callable[[_Leaf], Iterator[tuple[Index, Callable[[], np.ndarray]]]]


def stream_scale_up(
  source: ModelReader,
  output: str | os.PathLike[str],
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
  checked: Check | None = None,
  progress: Progress,
) -> StoredModel:
  """`scale_up` of a MODEL directory into another.

  Args:
    source: of `model_dir.open_model`.
    output: the directory to write; it must not exist.
    target: the architecture to grow into.
    options: as for `scale_up`; any method but random, which reads nothing.
    seed: of what is drawn.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.
    checked: what `checking.check` measured, for the lineage.
    progress: told how far it is.

  Returns:
    The grown model, with shapes for parameters.

  Raises:
    errors.UserError: as `scale_up`, or where the source is damaged.
  """
  assert options.method != "random"
  stored = scale_up.grown_header(
    source.model,
    target,
    options,
    seed=seed,
    name=name,
    path=path,
    checked=checked,
  )
  trees = grown_trees(source, target, options, seed=seed, path=path)

  def slices(leaf: _Leaf):
    tree = trees[leaf.role]
    for index in grown_tree.slices(leaf.spec):
      yield index, functools.partial(_grown, tree, leaf, index)

  return _stream(
    source,
    output,
    stored,
    slices=slices,
    keep_moments=options.optimizer == "grow",
    progress=progress,
  )


_buffers = threading.local()


def _grown(tree: GrownTree, leaf: _Leaf, index: Index) -> np.ndarray:
  """A slice, in memory that this thread has had for the last one of its shape.

  It was written by then: a thread takes one slice all the way.
  """
  shape = grown_tree.slice_shape(leaf.spec, index)
  key = (shape, leaf.spec.dtype)
  if getattr(_buffers, "key", None) != key:
    _buffers.key, _buffers.out = key, np.empty(shape, leaf.spec.dtype)
  return tree.read(leaf.name, index=index, out=_buffers.out)


def grown_trees(
  source: ModelReader,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  path: str = "config.model",
) -> Mapping[str, GrownTree]:
  """The trees of a MODEL directory, grown as they are read.

  Args and errors are those of `stream_scale_up`.

  Returns:
    By role: "params", and "ema", "mu" and "nu" where the MODEL has them.
  """
  growth = scale_up.make_growth(
    source.model.config, target, options, seed=seed, path=path
  )
  scale_up.refuse_learned(growth)
  return {
    role: GrownTree(
      reader,
      growth,
      leaves=scale_up.model_leaves(target, role=role),
      powers=scale_up.POWERS[role],
      seed=seed,
      prefix=_PREFIX.get(role, ""),
    )
    for role, reader in _readers(source).items()
    if reader is not None
  }


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
    slices=functools.partial(
      _expert_slices, source=source, target=target, seed=seed
    ),
    keep_moments=options.optimizer == "grow",
    progress=progress,
  )


def _readers(source: ModelReader) -> dict[str, array_store.TreeReader | None]:
  return {
    "params": source.params,
    "ema": source.ema,
    "mu": source.optimizer,
    "nu": source.optimizer,
  }


def _expert_slices(
  leaf: _Leaf, *, source: ModelReader, target: ModelConfig, seed: int
) -> Iterator[tuple[Index, Callable[[], np.ndarray]]]:
  moe, axes = target.moe, leaf.spec.axes
  assert moe is not None
  if axes.has("expert", Role.WRITES):
    if leaf.role in ("mu", "nu") or axes.is_selection_bias:
      yield (), lambda: np.zeros(leaf.spec.shape, leaf.spec.dtype)
      return
    # In the dtype of the parameters, also for the average of them.
    shape = jax.ShapeDtypeStruct(leaf.spec.shape, jnp.dtype(target.param_dtype))
    draw = jax.jit(scale_out.router_init(moe, seed=seed), static_argnums=0)
    # Drawn here: whether JAX has 64 bits is a thread's own.
    yield (), functools.partial(_itself, np.asarray(draw(shape)))
    return
  reader = _readers(source)[leaf.role]
  assert reader is not None
  divisor = scale_out.moment_divisors(moe).get(leaf.role, 1)
  dim = axes.index("expert")
  previous, value = None, np.zeros(())
  for index in grown_tree.slices(leaf.spec):
    # The experts of a layer follow each other, and are the same.
    wanted = tuple(i for d, i in enumerate(index) if d != dim)
    if wanted != previous:
      value = reader.read(leaf.prefix + leaf.name, index=wanted)
      if dim is not None:
        value = value / np.asarray(divisor, value.dtype)
      previous = wanted
    yield index, functools.partial(_itself, value)


def _itself(value: np.ndarray) -> np.ndarray:
  return value


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
  with (
    model_dir.writing(
      output,
      stored,
      axes=decoder_lm.parameter_axes(stored.config),
      with_optimizer=optimizer is not None,
      with_ema=source.ema is not None,
    ) as writer,
    ThreadPoolExecutor(_AT_ONCE) as pool,
  ):
    pending: collections.deque[Future[None]] = collections.deque()
    leaves = list(_leaves(writer, stored.config))
    for number, (leaf, tree) in enumerate(leaves, 1):
      for index, make in slices(leaf):
        while len(pending) >= _AT_ONCE:
          pending.popleft().result()
        pending.append(pool.submit(_write, tree, leaf, index, make))
      progress(f"{number} of {len(leaves)} leaves: {leaf.role} {leaf.name}")
    for future in pending:
      future.result()
    if writer.optimizer is not None:
      assert optimizer is not None
      writer.optimizer.write("count", optimizer.read("count"))
  return stored


def _write(
  tree: array_store.TreeWriter,
  leaf: _Leaf,
  index: Index,
  make: Callable[[], np.ndarray],
) -> None:
  part = make().astype(leaf.spec.dtype, copy=False)
  tree.write(leaf.prefix + leaf.name, part, index=index)


def _leaves(
  writer: ModelWriter, target: ModelConfig
) -> Iterator[tuple[_Leaf, array_store.TreeWriter]]:
  """Every leaf of the target that is grown, and where it is written."""
  trees = {"params": writer.params}
  if writer.ema is not None:
    trees["ema"] = writer.ema
  if writer.optimizer is not None:
    trees |= {moment: writer.optimizer for moment in ("mu", "nu")}
  for role, tree in trees.items():
    for name, spec in scale_up.model_leaves(target, role=role).items():
      yield _Leaf(role=role, name=name, spec=spec), tree
