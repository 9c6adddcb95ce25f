"""What the loop takes its batches from, and how they reach the devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from aquila_jax.core import errors, token_order
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
  data: PreparedData, *, train: TrainConfig, seed: int
) -> TrainInput:
  """The training split of prepared data.

  Args:
    data: of prepare_data.
    train: batch size and sequence length.
    seed: of the order of documents and of the mixture.

  Returns:
    The input of a TrainJob.
  """

  def batches(state: DataState) -> Iterator[tuple[Batch, DataState]]:
    return loader.train_batches(
      data,
      state=state,
      batch_size=train.batch_size,
      sequence_length=train.sequence_length,
      seed=seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  return TrainInput(
    languages=tuple(data.languages),
    batches=batches,
    epochs=lambda state: loader.epochs(data, state),
  )


def place(batch: Batch, *, like: Batch) -> Batch:
  """Puts a batch of NumPy arrays on the devices.

  Args:
    batch: this process's rows.
    like: of `step.abstract_batch`: shapes, dtypes and shardings of the whole.

  Returns:
    The batch, its rows spread over the devices.
  """
  return jax.tree.map(
    lambda rows, leaf: jax.make_array_from_process_local_data(
      leaf.sharding, np.asarray(rows, leaf.dtype), leaf.shape
    ),
    batch,
    like,
  )


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
  if token_parts > 1 and not token_order.divides(length, token_parts):
    multiple = 2 * token_parts
    nearest = max(round(length / multiple), 1) * multiple
    raise errors.UserError(
      f"{path}.sequence_length={length}: expected a multiple of {multiple}, two"
      f" chunks for each of config.mesh.sequence={token_parts}; the nearest is"
      f" {nearest}"
    )
