"""The training step of a stage, and what it takes, before any of it exists."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.lineage import Copies
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, TrainState
from aquila_jax.models import decoder_lm
from aquila_jax.training import inputs
from aquila_jax.training import state as state_lib
from aquila_jax.training import step as step_lib
from aquila_jax.training.balance import initial_weights
from aquila_jax.training.freezing import NewIndices, trainable_masks
from aquila_jax.training.growth_mask import mask_schedule
from aquila_jax.training.optimizers import learning_rate, make_optimizer
from aquila_jax.training.spikes import no_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A jitted step; nothing is compiled or allocated."""

  jitted: Any  # (state, batch) -> (state, metrics); consumes the state
  optimizer: optax.GradientTransformation
  state: TrainState  # of ShapeDtypeStruct with shardings
  batch: Batch  # of ShapeDtypeStruct with shardings

  def lower(self) -> jax.stages.Lowered:
    """For the devices of its mesh, which need not be there."""
    return self.jitted.lower(self.state, self.batch)


def make_program(
  model: ModelConfig,
  config: TrainConfig,
  *,
  mesh: Mesh | AbstractMesh,
  total_steps: int,
  num_languages: int = 1,
  seed: int = 0,
  new_indices: NewIndices | None = None,
  copies: Copies | None = None,
  trained_steps: int | None = None,
  path: str = "config.train",
) -> Program:
  """Checks a stage's config against model and devices, and describes its step.

  Args:
    model: the architecture; of a growth mask, with its value at step 0.
    config: of the stage.
    mesh: of the devices.
    total_steps: of the schedule.
    num_languages: above every language index of a batch.
    seed: of the routers' noise.
    new_indices: what the last growth added, for freeze.new_only.
    copies: of the growths, for growth_lr.
    trained_steps: of the weights, for continuation.
    path: the dotted name of `config`, for messages.

  Returns:
    The program.

  Raises:
    errors.UserError: where they do not fit; it names the field.
  """
  axes = decoder_lm.parameter_axes(model)
  shapes = decoder_lm.abstract_params(model)
  batch = step_lib.abstract_batch(config, mesh=mesh)
  inputs.check_batch_divides(config, like=batch, path=path)
  mask_schedule(config, model.growth_mask, path=path)
  masks = trainable_masks(
    config.freeze,
    axes=axes,
    shapes=shapes,
    new_indices=new_indices,
    path=f"{path}.freeze",
  )
  optimizer = make_optimizer(
    config.optimizer, axes, copies=copies, path=f"{path}.optimizer"
  )
  state = state_lib.abstract_state(
    shapes,
    optimizer=optimizer,
    axes=axes,
    mesh=mesh,
    keep_ema=config.optimizer.ema_decay is not None,
    balance_weights=initial_weights(config.loss, model),
    recent=no_steps(config.spikes),
  )
  train_step = step_lib.make_train_step(
    config,
    model=model,
    optimizer=optimizer,
    schedule=learning_rate(
      config.optimizer,
      total_steps,
      trained_steps=trained_steps,
      path=f"{path}.optimizer",
    ),
    masks=masks,
    num_languages=num_languages,
    seed=seed,
  )
  jitted = step_lib.jit_train_step(
    train_step,
    state=state,
    batch=batch,
    mesh=mesh,
    overlap=config.overlap_collectives,
  )
  return Program(jitted=jitted, optimizer=optimizer, state=state, batch=batch)
