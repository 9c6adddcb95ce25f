"""How the leaves of a tree are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.growth.grown_tree import ArrayTree
from aquila_jax.sharding.mesh import make_mesh

VALUES = np.arange(8 * 3 * 2).reshape(8, 3, 2)


def test_slices_of_a_leaf_on_the_host_are_looked_at_where_it_lies():
  leaf = jnp.asarray(VALUES, device=jax.devices("cpu")[0])
  tree = ArrayTree({"layers": {"kernel": leaf}})
  for index in ((), (5,), (slice(None), 1), (2, slice(1, 3))):
    found = tree.read("layers.kernel", index=index)
    np.testing.assert_array_equal(found, VALUES[index])
    assert np.shares_memory(found, np.asarray(leaf))
  rows = tree.read("layers.kernel", index=(np.array([6, 0, 6]), 2))
  np.testing.assert_array_equal(rows, VALUES[[6, 0, 6], 2])


def test_slices_of_a_leaf_on_a_mesh_are_the_same():
  mesh = make_mesh(MeshConfig(data=1, fsdp=8))
  sharding = jax.NamedSharding(mesh, PartitionSpec("fsdp"))
  leaf = jax.device_put(VALUES, sharding)
  found = ArrayTree({"kernel": leaf}).read("kernel", index=(5, slice(1, 3)))
  np.testing.assert_array_equal(found, VALUES[5, 1:3])
