"""Gathered kernels have the gradients of kernels that were never divided."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.layers.gathering import gathered_here, scattered
from aquila_jax.sharding.mesh import BATCH_AXES, make_mesh

TPU = Target(platform="tpu", device_kind="TPU v6 lite")
CPU = Target(platform="cpu", device_kind="cpu")
MESHES = {
  "all": MeshConfig(data=1, fsdp=8),
  "pairs": MeshConfig(data=1, fsdp=4, expert=2),
  "two axes": MeshConfig(data=1, fsdp=4, sequence=2),
  "one": MeshConfig(data=4, fsdp=1, expert=2),
}


def _loss(kernels, x):
  return jnp.sum(jnp.sin(jnp.einsum("MD,EDF->EMF", x, kernels)))


def _on_mesh(mesh, spec):
  """The loss of all rows, each on its device."""

  def on_device(kernel, x):
    loss = _loss(gathered_here(kernel, spec), x)
    return jax.lax.psum(loss, mesh.axis_names)

  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(spec, P((*BATCH_AXES, "sequence"))),
    out_specs=P(),
    check_vma=False,
  )


@functools.cache
def _inputs(rows: int):
  rng = np.random.default_rng(rows)
  kernels = rng.normal(size=(2, 8 * rows, 16))
  x = rng.normal(size=(16, 8 * rows))
  return jnp.asarray(kernels, jnp.float32), jnp.asarray(x, jnp.float32)


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize(
  "spec", [P(None, ("fsdp", "sequence")), P(None, None, "fsdp")]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("there", [TPU, CPU], ids=lambda t: t.platform)
def test_gradients_are_those_of_one_device(there, mesh, rows, spec):
  kernel, x = _inputs(rows)
  expected = jax.jit(jax.grad(_loss))(kernel, x)
  # The CPU's own collectives take part in both.
  with compiling_for(there):
    found = jax.jit(jax.grad(_on_mesh(make_mesh(MESHES[mesh]), spec)))(
      kernel, x
    )
  # Sums of 16 rows of products of up to 64, in another order.
  tolerance = np.sqrt(16 * 64) * 2.0**-24 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.fixture
def groups(monkeypatch):
  """Of the scatterings of a gradient, how many devices take part in each."""
  found: list[int] = []
  scatter = jax.lax.psum_scatter

  def noted(x, axis_name, *, axis_index_groups=None, **options):
    size = jax.lax.axis_size(axis_name)
    found.append(len(axis_index_groups[0]) if axis_index_groups else size)
    return scatter(x, axis_name, axis_index_groups=axis_index_groups, **options)

  monkeypatch.setattr(jax.lax, "psum_scatter", noted)

  def of(there: Target, mesh: str, rows: int, *, dtype=jnp.float32, shape=(2,)):
    found.clear()
    run = jax.shard_map(
      lambda grad: scattered(grad, ("fsdp",), len(shape)),
      mesh=make_mesh(MESHES[mesh]),
      in_specs=P(),
      out_specs=P(*len(shape) * [None], "fsdp"),
      check_vma=False,
    )
    with compiling_for(there):
      jax.eval_shape(run, jax.ShapeDtypeStruct((*shape, 8 * rows, 16), dtype))
    return list(found)

  return of


def test_neighbours_have_whole_tiles_together_on_tpus(groups):
  assert groups(CPU, "all", 3) == [8]
  # A sum over all devices; over those that share an expert.
  assert groups(TPU, "all", 8) == [4, 2]
  assert groups(TPU, "pairs", 8) == [4]
  # Of a device's 8 * rows / 4, a tile has 8, of bfloat16 16.
  assert groups(TPU, "pairs", 2) == [2, 2]
  assert groups(TPU, "pairs", 8, dtype=jnp.bfloat16) == [4]
  assert groups(TPU, "pairs", 4, dtype=jnp.bfloat16) == [2, 2]
  # A kernel alone is scattered by any rows.
  assert groups(TPU, "pairs", 2, shape=()) == [4]
  assert groups(TPU, "all", 2, shape=()) == [4, 2]
  # No number of devices has a whole tile: nothing would be won.
  assert groups(TPU, "pairs", 1) == [4]
