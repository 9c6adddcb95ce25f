"""One step of a run again, alone, and what its batch does to the model.

The run is taken up at the checkpoint before the step and goes, without writing
anything, to where the step began: the state is that of the run, to the bit.
There the batch is looked at row by row and its gradient leaf by leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aquila_jax.core import errors
from aquila_jax.core.axes import path_name
from aquila_jax.core.types import Batch, TrainState
from aquila_jax.data.loader import DataState
from aquila_jax.models.target_nats import target_nats
from aquila_jax.sharding.mesh import on_mesh
from aquila_jax.training import inputs
from aquila_jax.training.accumulation import LossGradient
from aquila_jax.training.checkpointing import Checkpoints
from aquila_jax.training.growth_mask import mask_schedule
from aquila_jax.training.loop import TrainJob, build_step, initial_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafGradient:
  """Of one parameter."""

  name: str
  norm: float  # of the gradient, before clipping
  parameter_norm: float
  num_bad: int  # elements that are not finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
  """A step that was looked at."""

  step: int
  checkpoint: int  # that the run was taken up at; 0 is the stage's start
  losses: tuple[float, ...]  # of the steps since, this one the last
  loss: float  # nats a token, cross-entropy alone
  gradient_norm: float  # before clipping
  update_norm: float
  is_finite: bool  # loss, gradients and new parameters
  batch: Batch  # NumPy arrays [B T]
  nats: np.ndarray  # float [B T]; of every target
  leaves: tuple[LeafGradient, ...]  # the worst first


def replay(
  job: TrainJob, step: int, *, say: Callable[[str], None] = lambda line: None
) -> Replay:
  """Takes a step of a run again.

  Args:
    job: of the run; its workdir is only read.
    step: which, from 1 to the last of the stage.
    say: takes a line for the person at the terminal.

  Returns:
    The step.

  Raises:
    errors.UserError: where several processes ask.
  """
  assert 1 <= step <= job.total_steps, step
  if jax.process_count() > 1:
    raise errors.UserError(
      f"--replay_step={step}: expected one process; there are"
      f" {jax.process_count()}"
    )
  program, train_step = build_step(job)
  with Checkpoints(
    job.workdir / "checkpoints", config=job.train.checkpoint
  ) as saved:
    first = saved.newest_until(step - 1)
    if first is None:
      state, data_state = initial_state(job, program), job.data_state
    else:
      state, progress = saved.restore(
        program.state,
        config=job.saved_config,
        path=job.config_path,
        step=first,
      )
      data_state = DataState.from_json(progress["data_state"])
  first = first or 0
  if first < step - 1:
    say(f"steps {first + 1} to {step - 1} again, from the checkpoint before")
  batches = job.input.batches(data_state)
  before = []
  for _ in range(first + 1, step):
    batch, _ = next(batches)
    placed = inputs.place(batch, like=program.batch)
    state, metrics = train_step(state, placed)
    before.append(metrics.loss)
  batch, _ = next(batches)
  placed = inputs.place(batch, like=program.batch)
  nats, leaves = _looked_at(job, state, placed)
  _, metrics = train_step(state, placed)
  losses = tuple(map(float, jax.device_get([*before, metrics.loss])))
  return Replay(
    step=step,
    checkpoint=first,
    losses=losses,
    loss=losses[-1],
    gradient_norm=float(metrics.gradient_norm),
    update_norm=float(metrics.update_norm),
    is_finite=bool(metrics.finite),
    batch=batch,
    nats=nats,
    leaves=leaves,
  )


def _looked_at(
  job: TrainJob, state: TrainState, batch: Batch
) -> tuple[np.ndarray, tuple[LeafGradient, ...]]:
  """What every target costs, and what every leaf is told."""
  mask = mask_schedule(job.train, job.model.growth_mask)
  mask_value = None if mask is None else mask.traced(state.step)
  with jax.sharding.use_abstract_mesh(job.mesh.abstract_mesh):
    nats = target_nats(job.model, state.params, batch, mask_value)
  gradient = LossGradient(
    config=job.train,
    model=job.model,
    num_languages=len(job.input.languages),
    seed=job.seed,
  )

  def norms(state: TrainState, batch: Batch, mask_value: Any) -> Any:
    grads, _ = gradient(
      state.params,
      batch,
      step=state.step,
      mask_value=mask_value,
      balance_weights=state.balance_weights,
    )
    return jax.tree.map(_numbers, grads, state.params)

  found = _jitted(norms, job.mesh)(state, batch, mask_value)
  leaves = [
    LeafGradient(
      name=path_name(path),
      norm=float(numbers[0]),
      parameter_norm=float(numbers[1]),
      num_bad=int(numbers[2]),
    )
    for path, numbers in jax.tree_util.tree_leaves_with_path(
      jax.device_get(found)
    )
  ]
  leaves.sort(key=lambda leaf: (-leaf.num_bad, -np.nan_to_num(leaf.norm)))
  return np.asarray(nats), tuple(leaves)


def _jitted(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  return jax.jit(on_mesh(function, mesh))


def _numbers(grad: jax.Array, param: jax.Array) -> jax.Array:
  """Norms of gradient and parameter, and elements that are not finite."""
  squares = (
    jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in (grad, param)
  )
  bad = jnp.sum(~jnp.isfinite(grad)).astype(jnp.float32)
  return jnp.stack([*squares, bad])
