"""What kernels are chosen by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.kernels import target as target_lib
from aquila_jax.kernels.expert_ffn import api as expert_ffn
from aquila_jax.kernels.topk_routing import api as topk_routing
from aquila_jax.sharding.mesh import make_mesh

TPU = target_lib.Target(platform="tpu", device_kind="TPU v5")
GPU = target_lib.Target(platform="gpu", device_kind="NVIDIA H100")


def test_it_is_this_process_or_what_is_compiled_for():
  here = target_lib.target()
  assert here == target_lib.Target(platform="cpu", device_kind="cpu")
  with target_lib.compiling_for(TPU):
    assert target_lib.target() == TPU
  with pytest.raises(KeyError), target_lib.compiling_for(TPU):
    raise KeyError
  assert target_lib.target() == here


def _in_context(mesh, manual: tuple[str, ...]) -> tuple[bool, str, str]:
  """In shard_map over some axes: whether arrays are whole; what is chosen."""
  found = []

  def body(x):
    names = topk_routing.platform_default(), expert_ffn.platform_default()
    found.append((target_lib.is_whole(), *names))
    return x

  def function(x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      if not manual:
        return body(x)
      return jax.shard_map(
        body, in_specs=P(), out_specs=P(), axis_names=set(manual)
      )(x)

  jax.make_jaxpr(function)(jnp.zeros(8))
  return found[0]


@pytest.mark.parametrize(
  ("manual", "is_whole"),
  [
    ((), False),
    (("data", "fsdp"), False),
    (("data", "fsdp", "expert", "sequence", "tensor"), True),
  ],
)
def test_kernels_need_whole_arrays(manual, is_whole):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=1, tensor=2))
  with target_lib.compiling_for(TPU):
    whole, routing, _ = _in_context(mesh, manual)
  assert (whole, routing) == (is_whole, "pallas_tpu" if is_whole else "xla")
  with target_lib.compiling_for(GPU):
    whole, _, experts = _in_context(mesh, manual)
  assert (whole, experts) == (is_whole, "pallas_gpu" if is_whole else "xla")


def test_without_a_mesh_one_device_has_everything(monkeypatch):
  assert not target_lib.is_whole()  # eight simulated ones
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert target_lib.is_whole()
