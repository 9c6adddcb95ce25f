"""The experts' kernels through the TPU's own compiler; `make tpu`, no TPU."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aquila_jax.kernels.expert_ffn import pallas_tpu
from aquila_jax.kernels.target import num_cores
from aquila_jax.planning.tpu_schedule import Clock
from benchmarks import expert_ffn_tpu

TOPOLOGIES = ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v5e:2x2", "tpu7x:2x2x1"]
OUTER = {"expert_gate_up_gradient", "expert_down_gradient"}
# What takes two of a device of two cores.
ONE = {"expert_hidden_and_output", "expert_hidden_and_rows_gradients"}
TWO = {
  "expert_gate_up",
  "expert_down",
  "expert_hidden_gradients",
  "expert_rows_gradient",
}
# Of the published rate: 64 small experts, forward and backward.
BARS = {"v5p:2x2x1": 0.85, "v6e:2x2": 0.70}


@functools.cache
def clock(topology: str) -> Clock:
  """One of them; the compiler's flags are those of the first."""
  return Clock(topology)


def _loss(rows, kernels, block_expert, num_blocks, *, kind):
  out = pallas_tpu.expert_ffn(
    rows,
    kernels,
    block_expert=block_expert,
    num_blocks=num_blocks,
    device_kind=kind,
  )
  return jnp.sum(jnp.square(out.astype(jnp.float32)))


def _shapes(num_blocks, size, width, hidden, experts, dtype):
  into = jax.ShapeDtypeStruct((experts, width, hidden), dtype)
  back = jax.ShapeDtypeStruct((experts, hidden, width), dtype)
  return (
    jax.ShapeDtypeStruct((num_blocks, size, width), dtype),
    (into, into, back),
    jax.ShapeDtypeStruct((num_blocks,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )


@pytest.mark.parametrize(
  "shape",
  [
    # P, Q, D, F, E, dtype
    (9, 64, 320, 640, 4, jnp.float32),
    (40, 64, 512, 352, 16, jnp.bfloat16),
    (5, 24, 100, 60, 3, jnp.bfloat16),
  ],
  ids=str,
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_odd_shapes_compile_with_their_gradients(topology, shape):
  clock_ = clock(topology)
  loss = functools.partial(_loss, kind=clock_.device.device_kind)
  schedule = clock_.measure(jax.grad(loss, (0, 1)), *_shapes(*shape))
  found = {
    name[0]
    for kernel in schedule.kernels
    if (name := re.search("expert_[a-z_]*[a-z]", kernel.name))
  }
  cores = num_cores(clock_.device.device_kind)
  assert found == OUTER | (TWO if cores == 2 else ONE)


@functools.cache
def measured(topology: str, workload: int) -> dict:
  """A row of the benchmark, forward and backward."""
  return expert_ffn_tpu.measured(
    clock(topology),
    expert_ffn_tpu.WORKLOADS[workload],
    "pallas_tpu",
    backward=True,
  )


@pytest.mark.parametrize("topology", list(BARS))
def test_share_of_the_published_rate(topology):
  row = measured(topology, 1)
  assert BARS[topology] <= row["mfu"] <= 1
  # g, u, their gradients and hidden units, of all rows: 1 GiB.
  assert row["temporaries_gib"] <= 1


@pytest.mark.parametrize("share", ["mfu", "roofline_mfu"])
@pytest.mark.parametrize("topology", list(BARS))
def test_small_experts_get_most_of_the_rate_of_large_ones(topology, share):
  """64 of 704 units beside 8 of 5632, also where memory decides."""
  large, small = measured(topology, 0), measured(topology, 1)
  assert small[share] >= 0.8 * large[share]


@pytest.mark.parametrize("topology", list(BARS))
def test_experts_of_which_a_core_holds_a_part_wait_for_no_memory(topology):
  """4 of 20480 units: summed over in parts, rows are fetched once or twice."""
  row = measured(topology, 3)
  deep = {name for name in row["parts"] if pallas_tpu.DEEP in name}
  assert len(deep) == 2
  assert row["roofline_mfu"] >= 0.99 * row["mfu"] >= 0.99 * 0.85


@pytest.mark.parametrize("pod", ["v5p:4x4x4", "v6e:8x8"])
def test_each_shard_of_a_pod_has_kernels(pod):
  """Inside of shard_map, with types checked; kernels are shared by shards."""
  clock("v5p:2x2x1")
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=pod
  ).devices
  mesh = Mesh(np.asarray(devices), ("data",))
  kind = devices[0].device_kind

  def shard(rows, kernels, block_expert, num_blocks):
    found = _loss(rows, kernels, block_expert, num_blocks[0], kind=kind)
    return jax.lax.psum(found, "data")

  specs = (P("data"), P(), P("data"), P("data"))
  loss = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P())
  rows, kernels, expert, _ = _shapes(64 * 4, 64, 256, 512, 4, jnp.bfloat16)
  used = jax.ShapeDtypeStruct((64,), jnp.int32)
  arguments = [
    jax.tree.map(
      lambda a, spec=spec: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
      ),
      argument,
    )
    for argument, spec in zip((rows, kernels, expert, used), specs, strict=True)
  ]
  gradient = jax.jit(jax.grad(loss, (0, 1)))
  text = gradient.lower(*arguments).compile().as_text() or ""
  assert "expert_gate_up_gradient" in text
  # The gradients of shared kernels are summed; rows stay where they are.
  assert "all-reduce" in text
  assert "all-gather" not in text
