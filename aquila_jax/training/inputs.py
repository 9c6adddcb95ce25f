"""What the loop takes its batches from, and how they reach the devices."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import errors, processes, token_order
from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.types import Batch
from aquila_jax.data import loader
from aquila_jax.data.loader import DataState
from aquila_jax.data.prepared import PreparedData
from aquila_jax.sharding.mesh import BATCH_AXES, SEQUENCE_AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainInput:
  """A stream of batches that can start at any position."""

  languages: tuple[str, ...]  # names of the language indices in a batch
  # From a position: endless batches, each with the position after it.
  batches: Callable[[DataState], Iterator[tuple[Batch, DataState]]]
  # Of a position: how often each source has been read.
  epochs: Callable[[DataState], dict[str, float]]


def prepared_input(
  data: PreparedData,
  *,
  train: TrainConfig,
  seed: int,
  mesh: Mesh | None = None,
) -> TrainInput:
  """The training split of prepared data.

  Args:
    data: of prepare_data.
    train: batch size and sequence length.
    seed: of the order of documents and of the mixture.
    mesh: on which `place` will lay the batches: only rows of this process's
      devices are read. None reads all.

  Returns:
    The input of a TrainJob.
  """
  rows = None
  if mesh is not None:
    rows = local_rows(mesh, train.batch_size)

  def batches(state: DataState) -> Iterator[tuple[Batch, DataState]]:
    return loader.train_batches(
      data,
      state=state,
      batch_size=train.batch_size,
      sequence_length=train.sequence_length,
      seed=seed,
      rows_read=rows,
    )

  return TrainInput(
    languages=tuple(data.languages),
    batches=batches,
    epochs=lambda state: loader.epochs(data, state),
  )


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...] | None:
  """The rows of a batch that lie on this process's devices, in rising order.

  Two processes have a row in common where a mesh axis that divides no rows goes
  from one to the other.

  Args:
    mesh: of the devices of all processes.
    batch_size: of the whole.

  Returns:
    The rows; None where they are all of them, or cannot be divided, which
    `check_batch_divides` says better.
  """
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if not processes.are_several() or batch_size % parts:
    return None
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  indices = sharding.addressable_devices_indices_map((batch_size,))
  found: set[int] = set()
  for index in indices.values():
    assert index is not None
    found.update(range(batch_size)[index[0]])
  return tuple(sorted(found))


def place(batch: Batch, *, like: Batch) -> Batch:
  """Puts a batch of NumPy arrays on the devices.

  Args:
    batch: this process's rows: those of `local_rows`.
    like: of `step.abstract_batch`: shapes, dtypes and shardings of the whole.

  Returns:
    The batch, its rows spread over the devices.
  """
  sharding, size = like.tokens.sharding, like.tokens.shape[0]
  assert isinstance(sharding, NamedSharding)
  assert isinstance(sharding.mesh, Mesh)
  rows = local_rows(sharding.mesh, size) or range(size)

  def placed(values, leaf):
    values = np.asarray(values, leaf.dtype)

    def part(index):
      wanted = range(size)[index[0]]
      first = bisect.bisect_left(rows, wanted.start)
      return values[first : first + len(wanted)][(slice(None), *index[1:])]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

  return jax.tree.map(placed, batch, like)


def check_batch_divides(config: TrainConfig, *, like: Batch, path: str) -> None:
  """Refuses a batch that cannot be spread over the devices.

  Args:
    config: with the batch size.
    like: of `step.abstract_batch`.
    path: the dotted name of `config`, for messages.

  Raises:
    errors.UserError: naming the nearest batch size or row length that can.
  """
  sharding = like.tokens.sharding
  assert isinstance(sharding, NamedSharding)
  sizes = sharding.mesh.shape
  num_parts = math.prod(sizes[axis] for axis in BATCH_AXES)
  multiple = num_parts * config.num_microbatches
  if config.batch_size % multiple:
    nearest = max(round(config.batch_size / multiple), 1) * multiple
    raise errors.UserError(
      f"{path}.batch_size={config.batch_size}: expected a multiple of"
      f" {multiple}, {config.num_microbatches} microbatches spread over"
      f" {num_parts} devices; the nearest is {nearest}"
    )
  length, token_parts = config.sequence_length, sizes[SEQUENCE_AXIS]
  if not token_order.divides(length, token_parts):
    multiple = 2 * token_parts
    nearest = max(round(length / multiple), 1) * multiple
    raise errors.UserError(
      f"{path}.sequence_length={length}: expected a multiple of {multiple}, two"
      f" chunks for each of config.mesh.sequence={token_parts}; the nearest is"
      f" {nearest}"
    )
