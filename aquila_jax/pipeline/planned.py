"""A stage's training step, compiled for TPUs that are not there."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import jax

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.layers.moe import expert_parallel
from aquila_jax.pipeline import budget
from aquila_jax.planning import counting, step_plan, tpu_program
from aquila_jax.planning.step_plan import Memory, StepPlan
from aquila_jax.planning.tpu_schedule import Clock, Schedule
from aquila_jax.sharding.mesh import BATCH_AXES, SEQUENCE_AXIS, make_mesh
from aquila_jax.training.program import Program, make_program

_OUT_OF_MEMORY = re.compile(r"Ran out of memory[^\n]*")
# Rows of a tile of the experts' kernels.
_TILE_ROWS = 512


def plan_step(
  experiment: ExperimentConfig, stage_name: str, topology: str
) -> StepPlan:
  """Compiles the step of a stage for a topology, and reads what it would cost.

  Args:
    experiment: with the mesh.
    stage_name: of its stages.
    topology: such as v5p:4x4x4; the numbers are chips along each dimension.

  Returns:
    The plan; where the program does not fit, of its arguments alone.

  Raises:
    errors.UserError: where topology, mesh and model do not fit each other, or
      there is no TPU compiler; it names the field.
  """
  stage = experiment.stages[stage_name]
  clock = _clock(topology)
  kind = clock.device.device_kind
  mesh = make_mesh(experiment.mesh, clock.devices)
  with compiling_for(Target(platform="tpu", device_kind=kind)):
    program = make_program(
      stage.model,
      stage.train,
      mesh=mesh,
      total_steps=budget.total_steps(experiment, stage_name),
      path=f"config.stages.{stage_name}.train",
    )
    lowered = program.lower()
  started = time.perf_counter()
  schedule, message = _compiled(clock, lowered)
  sizes = {str(axis): size for axis, size in mesh.shape.items()}
  estimate = None
  if schedule is not None:
    estimate = _estimate(
      schedule,
      coordinates=[device.coords for device in mesh.devices.flat],
      kind=kind,
      trips=grouped_steps(
        stage.model,
        num_tokens=stage.train.tokens_per_step
        // stage.train.num_microbatches
        // math.prod(mesh.shape[a] for a in (*BATCH_AXES, SEQUENCE_AXIS)),
        expert_devices=mesh.shape["expert"],
      ),
    )
  tokens = stage.train.tokens_per_step
  flops = tokens * counting.train_flops_per_token(
    stage.model, sequence_length=stage.train.sequence_length
  )
  return StepPlan(
    stage=stage_name,
    topology=topology,
    device_kind=kind,
    mesh=sizes,
    tokens=tokens,
    flops=flops / len(clock.devices),
    memory=_memory(program, schedule, kind),
    estimate=estimate,
    collectives=()
    if estimate is None
    else step_plan.by_axes(estimate.parts, mesh=sizes),
    compile_s=time.perf_counter() - started,
    message=message,
  )


def grouped_steps(
  model: ModelConfig, *, num_tokens: int, expert_devices: int = 1
) -> int:
  """Of a kernel over groups of rows in tiles, at most, where experts are even.

  Args:
    model: the architecture.
    num_tokens: of a device at once.
    expert_devices: that experts are divided over.

  Returns:
    Steps of a grid's dimension whose size the program computes.
  """
  if model.moe is None:
    return 1
  tiles = math.ceil(num_tokens * model.moe.top_k / _TILE_ROWS)
  return tiles + model.moe.num_experts // expert_devices - 1


def _clock(topology: str) -> Clock:
  try:
    clock = Clock(topology)
  except RuntimeError as error:
    raise errors.UserError(f"--{error}") from error
  kind, known = clock.device.device_kind, step_plan.HBM_BYTES
  if kind not in known:
    raise errors.UserError(
      f"--topology={topology}: of a {kind} no rates are known here; expected"
      f" one of {', '.join(known)} (v5e, v5p, v6e)"
    )
  return clock


def _compiled(
  clock: Clock, lowered: jax.stages.Lowered
) -> tuple[Schedule | None, str]:
  """The schedule, or None and what the compiler says does not fit."""
  try:
    return clock.compile(lowered), ""
  except jax.errors.JaxRuntimeError as error:
    found = _OUT_OF_MEMORY.search(str(error))
    if found is None:
      raise
    return None, found[0]


def _estimate(
  schedule: Schedule,
  *,
  coordinates: tpu_program.Coordinates,
  kind: str,
  trips: int,
) -> tpu_program.Estimate:
  assert schedule.compiled is not None
  return tpu_program.estimate(
    schedule.compiled.as_text() or "",
    chip=tpu_program.Chip.of(kind),
    coordinates=coordinates,
    kernel_cycles={
      kernel.name: kernel.cycles_of(trips) for kernel in schedule.kernels
    },
    rare=[expert_parallel.OVERFLOW],
  )


def _memory(program: Program, schedule: Schedule | None, kind: str) -> Memory:
  parameters = _bytes(program.state.params)
  optimizer = _bytes(program.state.opt_state) + _bytes(program.state.ema)
  state = _bytes(program.state)
  temporaries = None
  if schedule is not None:
    assert schedule.compiled is not None
    stats: Any = schedule.compiled.memory_analysis()
    # What comes out beside the new state, metrics, has memory of its own.
    others = stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes + max(0, others)
  return Memory(
    parameters=parameters,
    optimizer=optimizer,
    batch=_bytes(program.batch) + state - parameters - optimizer,
    temporaries=temporaries,
    hbm=step_plan.HBM_BYTES[kind],
  )


def _bytes(tree: Any) -> int:
  """Of one device, of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
