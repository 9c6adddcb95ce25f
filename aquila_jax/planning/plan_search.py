"""Meshes, microbatches and remat for a stage on a pod, the fastest first.

Everything is tried that divides the devices and the batch; what a step takes is
by arithmetic (step_memory.py, step_time.py). The batch of a step, which is a
matter of training, stays as it is.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator

from aquila_jax.core import errors, token_order
from aquila_jax.core.experiment_config import MeshConfig, TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.planning.pods import Pod
from aquila_jax.planning.quick_plan import QuickPlan
from aquila_jax.planning.step_memory import Step
from aquila_jax.sharding.mesh import BATCH_AXES, abstract_mesh

# Of HBM, what an estimate may take: compiled, it can be a tenth more.
MARGIN = 0.95
_REMATS = typing.get_args(typing.get_type_hints(ModelConfig)["remat"])


def search(
  stage: str, model: ModelConfig, train: TrainConfig, pod: Pod
) -> list[QuickPlan]:
  """All plans that fit.

  Args:
    stage: its name.
    model: of the stage; its remat is left aside.
    train: of the stage; its microbatches are left aside.
    pod: of the chips.

  Returns:
    By estimated tokens a second, the fastest first.
  """
  found = []
  models = [dataclasses.replace(model, remat=remat) for remat in _REMATS]
  for sizes in meshes(pod.num_devices, model):
    rows = train.batch_size
    for axis in BATCH_AXES:
      rows /= getattr(sizes, axis)
    if rows != int(rows):
      continue
    if not token_order.divides(train.sequence_length, sizes.sequence):
      continue
    mesh = abstract_mesh(sizes, num_devices=pod.num_devices)
    for parts in _divisors(int(rows)):
      cut = dataclasses.replace(train, num_microbatches=parts)
      for one in models:
        step = Step(model=one, train=cut, mesh=mesh)
        if _fits(step, pod):
          found.append(QuickPlan.of(stage, step, pod))
  return sorted(found, key=lambda plan: plan.time.without_overlap)


def _fits(step: Step, pod: Pod) -> bool:
  try:
    return step.total <= MARGIN * pod.hbm
  except errors.UserError:  # a size that the mesh does not divide
    return False


def meshes(num_devices: int, model: ModelConfig) -> Iterator[MeshConfig]:
  """All meshes of so many devices, but those with an axis of no use.

  Args:
    num_devices: of all axes together.
    model: that is divided; without experts, nothing lies over `expert`.

  Yields:
    Sizes of all axes, none open.
  """
  names = [field.name for field in dataclasses.fields(MeshConfig)]
  for sizes in _factors(num_devices, len(names)):
    mesh = dict(zip(names, sizes, strict=True))
    if model.moe is None and mesh["expert"] > 1:
      continue
    yield MeshConfig(**mesh)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
  if count == 1:
    yield (number,)
    return
  for first in _divisors(number):
    for rest in _factors(number // first, count - 1):
      yield (first, *rest)


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]
