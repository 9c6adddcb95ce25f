"""Sums of gradients over a pod, by the TPU compiler: a device has a part."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.layers.gathering import scattered
from aquila_jax.planning.tpu_schedule import Clock
from aquila_jax.sharding.mesh import make_mesh

_COLUMNS = 20480


def _largest_sum(clock: Clock, mesh_config: MeshConfig, rows: int) -> int:
  """Numbers of the largest sum that all of its devices have whole."""
  mesh = make_mesh(mesh_config, clock.devices)

  def on_device(x, upstream):
    # Of two experts.
    grad = jnp.stack(2 * [jnp.einsum("MD,MF->DF", x, upstream)])
    return scattered(grad, ("fsdp",), 1)

  tokens = P(("fsdp", "expert"))
  run = jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(tokens, tokens),
    out_specs=P(None, "fsdp"),
    check_vma=False,
  )

  def like(columns: int):
    return jax.ShapeDtypeStruct(
      (mesh.size * 128, columns),
      jnp.bfloat16,
      sharding=NamedSharding(mesh, tokens),
    )

  arguments = like(mesh_config.fsdp * rows), like(_COLUMNS)
  text = jax.jit(run).lower(*arguments).compile().as_text() or ""
  # What the compiler calls so does not leave the sum.
  text = re.sub(r"%all-reduce-scatter\S* \(.*?\n}", "", text, flags=re.DOTALL)
  shapes = re.findall(r"= bf16\[([\d,]*)\]\S* all-reduce(?:-start)?\(", text)
  return max(
    (int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes),
    default=0,
  )


@pytest.mark.parametrize(
  ("topology", "mesh", "rows"),
  [
    ("v5p:2x2x2", MeshConfig(data=1, fsdp=8), 160),  # over all devices
    ("v6e:8x8", MeshConfig(data=1, fsdp=32, expert=2), 40),  # half a tile
  ],
)
def test_no_device_has_the_whole_sum(topology, mesh, rows):
  clock = Clock(topology)
  whole = 2 * mesh.fsdp * rows * _COLUMNS
  # Told that it's for a CPU it is scattered as it is written.
  with compiling_for(Target(platform="cpu", device_kind="cpu")):
    assert _largest_sum(clock, mesh, rows) == whole
  kind = clock.device.device_kind
  with compiling_for(Target(platform="tpu", device_kind=kind)):
    # Two neighbours' rows, on their way to one's own.
    assert _largest_sum(clock, mesh, rows) <= whole / (mesh.fsdp / 2)
