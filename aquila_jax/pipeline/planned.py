"""A stage's training step, compiled for TPUs that are not there."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ExperimentConfig, TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.kernels.attention import splash
from aquila_jax.kernels.expert_ffn.pallas_tpu import DEEP, tile_rows_of
from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.layers.moe import expert_parallel
from aquila_jax.pipeline import budget
from aquila_jax.planning import counting, step_plan, tpu_program
from aquila_jax.planning.pods import Pod
from aquila_jax.planning.quick_plan import QuickPlan
from aquila_jax.planning.step_memory import Step
from aquila_jax.planning.step_plan import Memory, StepPlan
from aquila_jax.planning.tpu_schedule import Clock, Kernel, Schedule, Taken
from aquila_jax.sharding.mesh import abstract_mesh, make_mesh
from aquila_jax.training import inputs
from aquila_jax.training.program import Program, make_program
from aquila_jax.training.step import abstract_batch

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
  clock = make_clock(topology)
  kind = clock.device.device_kind
  mesh = make_mesh(experiment.mesh, clock.devices)
  program, lowered = lowered_step(
    stage.model,
    stage.train,
    mesh=mesh,
    total_steps=budget.total_steps(experiment, stage_name),
    path=f"config.stages.{stage_name}.train",
  )
  started = time.perf_counter()
  schedule, message = _compiled(clock, lowered)
  sizes = {str(axis): size for axis, size in mesh.shape.items()}
  step = Step(model=stage.model, train=stage.train, mesh=mesh.abstract_mesh)
  estimate = None
  if schedule is not None:
    estimate = _estimate(
      schedule,
      coordinates=[device.coords for device in mesh.devices.flat],
      kind=kind,
      step=step,
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
    num_microbatches=stage.train.num_microbatches,
    remat=stage.model.remat,
    options=_options(stage.model),
    flops=flops / len(clock.devices),
    memory=_memory(program, schedule, kind),
    estimate=estimate,
    collectives=()
    if estimate is None
    else step_plan.by_axes(estimate.parts, mesh=sizes),
    compile_s=time.perf_counter() - started,
    message=message,
  )


def _options(model: ModelConfig) -> dict[str, Any]:
  options: dict[str, Any] = dict(head_chunks=model.head_chunks)
  if model.moe is not None:
    options["moe"] = dict(
      exchange=model.moe.exchange, buffer_factor=model.moe.buffer_factor
    )
  return options


def lowered_step(
  model: ModelConfig,
  train: TrainConfig,
  *,
  mesh: Mesh,
  total_steps: int,
  path: str = "config.train",
) -> tuple[Program, jax.stages.Lowered]:
  """A step for the devices of a mesh, which need not be there.

  Args:
    model: the architecture.
    train: of the stage.
    mesh: of TPUs of a topology.
    total_steps: of the schedule.
    path: the dotted name of `train`, for messages.

  Returns:
    The program, and what is to be compiled.

  Raises:
    errors.UserError: where they do not fit; it names the field.
  """
  device = mesh.devices.flat[0]
  there = Target(platform=device.platform, device_kind=device.device_kind)
  with compiling_for(there):
    program = make_program(
      model, train, mesh=mesh, total_steps=total_steps, path=path
    )
    return program, program.lower()


def plan_memory(
  experiment: ExperimentConfig, stage_name: str, pod: Pod
) -> QuickPlan:
  """What the step of a stage takes, by arithmetic.

  Args:
    experiment: with the mesh.
    stage_name: of its stages.
    pod: of the chips.

  Returns:
    The plan.

  Raises:
    errors.UserError: as `plan_step`, of mesh and model.
  """
  stage = experiment.stages[stage_name]
  mesh = abstract_mesh(experiment.mesh, num_devices=pod.num_devices)
  inputs.check_batch_divides(
    stage.train,
    like=abstract_batch(stage.train, mesh=mesh),
    path=f"config.stages.{stage_name}.train",
  )
  step = Step(model=stage.model, train=stage.train, mesh=mesh)
  return QuickPlan.of(stage_name, step, pod)


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


def make_clock(topology: str) -> Clock:
  """The compiler for a topology of a kind whose rates are known.

  Raises:
    errors.UserError: where it is none, or there is no TPU compiler.
  """
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
    return clock.compile(lowered, pallas_only=True), ""
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
  step: Step,
) -> tpu_program.Estimate:
  assert schedule.compiled is not None
  return tpu_program.estimate(
    schedule.compiled.as_text() or "",
    chip=tpu_program.Chip.of(kind),
    coordinates=coordinates,
    kernel_cycles={
      kernel.name: _cycles(kernel, step) for kernel in schedule.kernels
    },
    moved_share=lambda name: step.filled if "expert_" in name else 1.0,
    rare=[expert_parallel.OVERFLOW],
  )


def _cycles(kernel: Kernel, step: Step) -> int:
  """Of a run, where experts are met evenly.

  What the code of a kernel does not say: splash skips blocks in which the mask
  leaves nothing; experts' kernels skip steps that no rows fill, of buffers for
  uneven ones, and set aside, fill with zeros or write what they have summed
  only where an expert's rows begin or end in a tile.
  """
  model, mesh = step.model, step.mesh
  if "splash" in kernel.name:
    share = splash.computed_share(
      step.train.sequence_length,
      head_dim=model.head_dim,
      dtype=model.compute_dtype,
      num_parts=mesh.shape["sequence"],
      window=model.sliding_window,
    )
    return kernel.cycles_of(1, taken=Taken(computing=share))
  if model.moe is None or "expert_" not in kernel.name:
    return kernel.cycles_of(1)
  steps = grouped_steps(
    model, num_tokens=step.tokens, expert_devices=mesh.shape["expert"]
  )
  return kernel.cycles_of(steps, taken=_experts_taken(kernel, step))


def _experts_taken(kernel: Kernel, step: Step) -> Taken:
  """Of the steps of a grid over tiles of rows, one for each of their experts.

  A tile in which experts meet is taken in parts, by both the one in which they
  do. What stands before and behind the rows of an expert is computed once for
  them all, and where a step takes but a part of a sum, once for all of these.
  """
  assert step.model.moe is not None
  experts = step.model.moe.num_experts // step.mesh.shape["expert"]
  tile_rows, part_rows = tile_rows_of(kernel.name)
  visits = math.ceil(step.rows() / tile_rows) + experts
  rows = step.tokens * step.model.moe.top_k + (experts - 1) * part_rows
  others = experts / visits
  if DEEP in kernel.name:
    trips = max(loop.trips or 1 for loop in kernel.loops if loop.depth == 1)
    others = visits / trips
  return Taken(
    computing=min(1.0, rows / tile_rows / visits), others=min(1.0, others)
  )


def _memory(program: Program, schedule: Schedule | None, kind: str) -> Memory:
  parameters = bytes_of_device(program.state.params)
  optimizer = bytes_of_device(program.state.opt_state) + bytes_of_device(
    program.state.ema
  )
  state = bytes_of_device(program.state)
  temporaries = None
  if schedule is not None:
    assert schedule.compiled is not None
    if schedule.total_bytes is None:
      raise RuntimeError("the compiler has written no report of its memory")
    stats: Any = schedule.compiled.memory_analysis()
    temporaries = schedule.total_bytes - stats.argument_size_in_bytes
  return Memory(
    parameters=parameters,
    optimizer=optimizer,
    batch=bytes_of_device(program.batch) + state - parameters - optimizer,
    temporaries=temporaries,
    hbm=step_plan.HBM_BYTES[kind],
  )


def bytes_of_device(tree: Any) -> int:
  """Of one device, of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
