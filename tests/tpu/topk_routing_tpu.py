"""The routing kernels through the TPU's own compiler; `make tpu`, no TPU."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aquila_jax.kernels.topk_routing import api
from aquila_jax.kernels.topk_routing.pallas_tpu import PallasTpu
from aquila_jax.kernels.topk_routing.reference import Xla
from aquila_jax.kernels.topk_routing.rule import RoutingRule
from aquila_jax.kernels.topk_routing.shapes import NAMED
from aquila_jax.planning.tpu_schedule import Clock
from benchmarks.topk_routing_schedule import measure

TOPOLOGIES = ["v5p:2x2x1", "v6e:2x2", "v5e:2x2", "tpu7x:2x2x1"]
# Of XLA's cycles; forward and backward together half of them.
BARS = {8: 2 / 3, 64: 1 / 3, 256: 1 / 6, 384: 1 / 6}


@functools.cache
def clock(topology: str) -> Clock:
  """One of them; the compiler's flags are those of the first."""
  return Clock(topology)


def _loss(logits, bias, valid, *, rule, backend):
  found = api.topk_routing(
    logits, rule, bias=bias, valid=valid, num_rows=2, implementation=backend
  )
  return jnp.sum(found.gates) + jnp.sum(found.probability**2) + found.z


ODD: Any = [
  # num_experts, top_k, tokens, dtype, order, bias, valid
  (7, 3, 300, jnp.float32, "sigmoid", True, True),
  (60, 4, 1000, jnp.bfloat16, "softmax_then_topk", True, False),
  (512, 1, 512, jnp.float32, "topk_then_softmax", False, True),
  (12, 12, 2048, jnp.bfloat16, "sigmoid", False, True),
  (16, 2, 4096, jnp.bfloat16, "softmax_then_topk", True, True),
  (72, 20, 600, jnp.float32, "softmax_then_topk", False, False),
]


@pytest.mark.parametrize(
  ("topology", "case"), list(itertools.product(TOPOLOGIES, ODD)), ids=str
)
def test_odd_shapes_compile_with_their_gradients(topology, case):
  num_experts, top_k, tokens, dtype, order, has_bias, has_valid = case
  clock_ = clock(topology)
  backend = PallasTpu(device_kind=clock_.device.device_kind)
  bias = jax.ShapeDtypeStruct((num_experts,), jnp.float32)
  valid = jax.ShapeDtypeStruct((tokens,), jnp.bool_)
  schedule = clock_.measure(
    jax.grad(
      functools.partial(
        _loss, rule=RoutingRule(top_k=top_k, order=order), backend=backend
      )
    ),
    jax.ShapeDtypeStruct((tokens, num_experts), dtype),
    bias if has_bias else None,
    valid if has_valid else None,
  )
  names = " ".join(kernel.name for kernel in schedule.kernels)
  assert "jvp_topk_routing_." in names
  assert "topk_routing_gradient" in names


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("work", NAMED, ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES[:2])
def test_cycles_against_xla(topology, work, backward):
  clock_ = clock(topology)
  kind = clock_.device.device_kind
  kernel, xla = (
    measure(clock_, backend, work, num_tokens=8192, backward=backward)
    for backend in (PallasTpu(device_kind=kind), Xla())
  )
  assert kernel.is_complete
  assert not any(part.spills for part in kernel.kernels)
  bar = 1 / 2 if backward else BARS[work.num_experts]
  assert kernel.cycles <= bar * xla.cycles


@pytest.mark.parametrize("topology", TOPOLOGIES[:2])
def test_four_times_the_work_is_four_times_the_cycles(topology):
  """So loops' trips are counted: the code is the same."""
  few, many = (
    clock(topology).measure(
      jnp.sort, jax.ShapeDtypeStruct((tokens, 256), jnp.float32)
    )
    for tokens in (8192, 32768)
  )
  np.testing.assert_allclose(many.cycles / few.cycles, 4, rtol=0.1)


def test_each_shard_of_a_pod_has_a_kernel():
  """Inside of shard_map, with types checked."""
  clock("v5p:2x2x1")
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name="v5p:4x4x4"
  ).devices
  mesh = Mesh(np.asarray(devices), ("data",))
  backend = PallasTpu(device_kind=devices[0].device_kind)
  loss = functools.partial(
    _loss, rule=RoutingRule(top_k=8), backend=backend, bias=None, valid=None
  )
  gradient = jax.jit(
    jax.shard_map(
      jax.grad(loss), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
  )
  logits = jax.ShapeDtypeStruct(
    (64 * 1024, 64), jnp.float32, sharding=NamedSharding(mesh, P("data"))
  )
  compiled = gradient.lower(logits).compile()
  text = compiled.as_text() or ""
  assert "topk_routing_gradient" in text
  assert "all-gather" not in text
