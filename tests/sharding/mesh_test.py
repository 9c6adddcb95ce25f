"""The mesh uses every device, in the order and with the sizes asked for."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.sharding.mesh import batch_sharding, make_mesh, nearest_divisors


@pytest.mark.parametrize(
  ("config", "shape"),
  [
    (MeshConfig(), (8, 1, 1, 1, 1)),
    (MeshConfig(data=2, fsdp=-1), (2, 4, 1, 1, 1)),
    (MeshConfig(data=1, fsdp=2, expert=2, tensor=2), (1, 2, 2, 1, 2)),
    (MeshConfig(data=2, sequence=-1, tensor=2), (2, 1, 1, 2, 2)),
    (MeshConfig(data=8, tensor=-1), (8, 1, 1, 1, 1)),
  ],
)
def test_sizes(config, shape):
  mesh = make_mesh(config)
  assert mesh.shape == dict(
    zip(("data", "fsdp", "expert", "sequence", "tensor"), shape, strict=True)
  )
  assert mesh.axis_types == (AxisType.Auto,) * 5
  assert set(mesh.devices.flat) == set(jax.devices())


def test_only_the_devices_given_are_used():
  mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
  assert dict(mesh.shape) == dict(
    data=2, fsdp=2, expert=1, sequence=1, tensor=1
  )
  assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      MeshConfig(fsdp=3),
      "config.mesh.fsdp=3 (data=-1, fsdp=3, expert=1, sequence=1, tensor=1):"
      " the product 3 must divide the number of devices, 8; fsdp=2 or 4 would"
      " fit",
    ),
    (
      MeshConfig(data=-1, expert=16),
      "config.mesh.expert=16 (data=-1, fsdp=1, expert=16, sequence=1,"
      " tensor=1): the product 16 must divide the number of devices, 8;"
      " expert=8 would fit",
    ),
    (
      MeshConfig(data=4),
      "config.mesh.data=4 (data=4, fsdp=1, expert=1, sequence=1, tensor=1):"
      " the product 4 must be the number of devices, 8; data=8 would fit",
    ),
    (
      MeshConfig(data=1, fsdp=3, tensor=5),
      "config.mesh.tensor=5 (data=1, fsdp=3, expert=1, sequence=1, tensor=5):"
      " the product 15 must be the number of devices, 8; change fsdp, tensor",
    ),
  ],
)
def test_sizes_that_do_not_fit_are_refused(config, message):
  with pytest.raises(UserError) as error:
    make_mesh(config)
  assert str(error.value) == message


def test_rows_are_divided_over_three_axes_and_tokens_over_one():
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  sharding = batch_sharding(mesh)
  assert sharding.spec == PartitionSpec(("data", "fsdp", "expert"), "sequence")
  assert sharding.shard_shape((8, 16)) == (2, 16)
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, sequence=4))
  assert batch_sharding(mesh).shard_shape((8, 16)) == (4, 4)


@pytest.mark.parametrize(
  ("number", "wanted", "nearest"),
  [(12, 5, [4, 6]), (12, 20, [12]), (7, 3, [1, 7]), (12, 4, [3, 6])],
)
def test_nearest_divisors(number, wanted, nearest):
  assert nearest_divisors(number, wanted) == nearest
