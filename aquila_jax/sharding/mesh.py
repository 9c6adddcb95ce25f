"""The device mesh, and how a batch lies on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.core.types import Device

# The axes over which the rows of a batch are divided. `expert` is one of them:
# devices that hold different experts would otherwise repeat all that is not an
# expert, and a dense stage of the same pipeline would leave them idle.
BATCH_AXES = ("data", "fsdp", "expert")
# The axis over which the tokens of each row are.
SEQUENCE_AXIS = "sequence"


def make_mesh(
  config: MeshConfig, devices: Sequence[Device] | None = None
) -> Mesh:
  """A mesh of data, fsdp, expert, sequence and tensor, in this order.

  Axes are `AxisType.Auto`: arrays carry their sharding and XLA propagates it,
  where `jax.make_mesh` by itself would ask every operation for a typed one.

  Args:
    config: the sizes; -1 takes the devices that the others leave.
    devices: all of them are used; None is every device there is.

  Returns:
    The mesh.

  Raises:
    errors.UserError: where the sizes do not use up the devices exactly.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = mesh_sizes(config, num_devices=len(devices))
  # An axis may lie along a part of a dimension of the torus.
  placed = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(config: MeshConfig, *, num_devices: int) -> dict[str, int]:
  """Axis -> size, of so many devices.

  Raises:
    errors.UserError: where the sizes do not use up the devices exactly.
  """
  sizes = dataclasses.asdict(config)
  given = math.prod(size for size in sizes.values() if size != -1)
  rest, remainder = divmod(num_devices, given)
  if remainder or (rest != 1 and -1 not in sizes.values()):
    raise _misfit(sizes, num_devices=num_devices)
  return {name: rest if n == -1 else n for name, n in sizes.items()}


def abstract_mesh(config: MeshConfig, *, num_devices: int) -> AbstractMesh:
  """As `make_mesh`, of devices that are not there.

  Raises:
    errors.UserError: as there.
  """
  sizes = mesh_sizes(config, num_devices=num_devices)
  return AbstractMesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Rows divided over `BATCH_AXES`, their tokens over `SEQUENCE_AXIS`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, SEQUENCE_AXIS))


def on_mesh(
  function: Callable[..., Any], mesh: Mesh | AbstractMesh
) -> Callable[..., Any]:
  """The function, traced with a mesh in the context.

  What the compiler cannot divide divides itself by it, in shard_map.

  Args:
    function: to be jitted.
    mesh: of its arguments.

  Returns:
    A function of the same name.
  """
  abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh

  @functools.wraps(function)
  def call(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(abstract):
      return function(*args, **kwargs)

  return call


def nearest_divisors(number: int, wanted: int) -> list[int]:
  """The largest divisor of `number` below `wanted`, and the least above."""
  divisors = [n for n in range(1, number + 1) if number % n == 0]
  below = [n for n in divisors if n < wanted]
  above = [n for n in divisors if n > wanted]
  return below[-1:] + above[:1]


def _misfit(sizes: dict[str, int], *, num_devices: int) -> errors.UserError:
  """The error for sizes that do not fit, with the nearest that do."""
  is_open = -1 in sizes.values()
  given = math.prod(size for size in sizes.values() if size != -1)
  # The field to change: the largest, since a size of 1 is never to blame.
  name = max(sizes, key=lambda axis: sizes[axis])
  others = given // sizes[name]
  if num_devices % others:
    fitting = []
  elif is_open:
    fitting = nearest_divisors(num_devices // others, sizes[name])
  else:
    fitting = [num_devices // others]
  hint = f"{name}={' or '.join(map(str, fitting))} would fit"
  if not fitting:
    hint = f"change {', '.join(axis for axis in sizes if sizes[axis] > 1)}"
  rule = "divide" if is_open else "be"
  shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
  return errors.UserError(
    f"config.mesh.{name}={sizes[name]} ({shown}): the product {given} must"
    f" {rule} the number of devices, {num_devices}; {hint}"
  )
