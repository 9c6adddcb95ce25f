"""A growth on a mesh of TPUs that are not there, and an export."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  ScaleOut,
  ScaleUp,
  StageConfig,
)
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.moments import AdamMoments
from aquila_jax.growth.grown_tree import (
  LeafSpec,
  slice_sharding,
  slices,
  update_slice,
)
from aquila_jax.growth.scale_up import model_leaves
from aquila_jax.interop.export_model import ExportSize, measure
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import budget
from aquila_jax.pipeline.planned import bytes_of_device, make_clock
from aquila_jax.planning import step_plan
from aquila_jax.planning.tpu_schedule import Clock
from aquila_jax.planning.transform_plan import GrowthPlan
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training.program import make_program
from aquila_jax.training.state import make_placement

_WIDE = 4  # bytes of float32


def plan_growth(
  experiment: ExperimentConfig, stage_name: str, topology: str
) -> GrowthPlan:
  """Compiles what a growth runs on devices, and adds up what it holds.

  Moments grow along where the stage says so.

  Args:
    experiment: with the mesh.
    stage_name: of its stages, which scales up or out.
    topology: as of `plan_step`.

  Returns:
    The plan.

  Raises:
    errors.UserError: as `plan_step`, or where the stage does not grow.
  """
  stage = experiment.stages[stage_name]
  if not isinstance(stage.init, ScaleUp | ScaleOut):
    raise errors.UserError(
      f"config.stages.{stage_name}.init.kind={stage.init.kind!r}: expected"
      " scale_up or scale_out, for a plan of growth"
    )
  source = _source_of(experiment, stage_name, stage)
  clock = make_clock(topology)
  mesh = make_mesh(experiment.mesh, clock.devices)
  program = make_program(
    stage.model,
    stage.train,
    mesh=mesh,
    total_steps=budget.total_steps(experiment, stage_name),
    path=f"config.stages.{stage_name}.train",
  )
  trees = 1 + 2 * (stage.init.optimizer == "grow")
  params = program.state.params
  moments = jax.tree.map(_widened, params) if trees > 1 else None
  held = bytes_of_device(params) + 2 * bytes_of_device(moments)
  grown = None
  if moments is not None:
    count: Any = jax.ShapeDtypeStruct(
      (), jnp.int32, sharding=program.state.step.sharding
    )
    grown = AdamMoments(count=count, mu=moments, nu=moments)
  placing = clock.compile(
    make_placement(program.optimizer, like=program.state).lower(
      params, grown, None
    )
  ).total_bytes
  assert placing is not None
  return GrowthPlan(
    stage=stage_name,
    topology=topology,
    mesh={str(axis): size for axis, size in mesh.shape.items()},
    source_bytes=_bytes(source, trees=trees),
    target_bytes=_bytes(stage.model, trees=trees),
    held=held,
    filling=held + _beside(clock, stage.model, params),
    placing=placing,
    hbm=step_plan.HBM_BYTES[clock.device.device_kind],
  )


def _source_of(
  experiment: ExperimentConfig, name: str, stage: StageConfig
) -> ModelConfig:
  """The source's architecture: a stage's, or that of a mixture before it."""
  parent = budget.parent_stage(experiment, name)
  if parent:
    return experiment.stages[parent].model
  if isinstance(stage.init, ScaleOut):
    return dataclasses.replace(stage.model, moe=None)
  raise errors.UserError(
    f"config.stages.{name}.init.source={budget.source_of(stage)!r}: expected a"
    " stage of the config, for a plan of growth"
  )


def _widened(leaf: Any) -> jax.ShapeDtypeStruct:
  dtype = jnp.promote_types(leaf.dtype, jnp.float32)
  return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _bytes(model: ModelConfig, *, trees: int) -> int:
  """Parameters, and the moments among so many trees."""
  leaves = jax.tree.leaves(decoder_lm.abstract_params(model))
  return sum(
    leaf.size * (leaf.dtype.itemsize + (trees - 1) * _WIDE) for leaf in leaves
  )


def _beside(clock: Clock, model: ModelConfig, params: Any) -> int:
  """The most that a slice takes beside the leaf that it is put into."""
  placed: Any = traverse_util.flatten_dict(params, sep=".")
  kinds = {
    (leaf.shape, leaf.dtype, placed[name].sharding.spec): (name, leaf)
    for name, leaf in model_leaves(model).items()
  }
  return max(
    _of_leaf(clock, leaf, placed[name].sharding)
    for name, leaf in kinds.values()
  )


def _of_leaf(clock: Clock, leaf: LeafSpec, sharding: NamedSharding) -> int:
  whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  index = next(iter(slices(leaf)))
  shape = tuple(
    1 if isinstance(i, int) else len(range(*i.indices(size)))
    for i, size in zip(index, leaf.shape, strict=True)
  )
  part = jax.ShapeDtypeStruct(
    shape, leaf.dtype, sharding=slice_sharding(shape, sharding)
  )
  starts = [0 if isinstance(i, int) else i.start or 0 for i in index]
  total = clock.compile(
    update_slice(sharding).lower(whole, part, starts)
  ).total_bytes
  assert total is not None
  return (
    total - math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  )


def plan_export(model: ModelConfig) -> tuple[dict[str, ExportSize], int]:
  """Sizes of an export by dtype, and the bytes that it reads.

  Raises:
    errors.UserError: where no stock class computes the same.
  """
  sizes = {
    dtype: measure(model, dtype=dtype) for dtype in ("bfloat16", "float32")
  }
  return sizes, _bytes(model, trees=1)
