"""Topologies by hand."""

from __future__ import annotations

import pytest

from aquila_jax.core import errors
from aquila_jax.planning.pods import Pod


def test_a_topology():
  pod = Pod.of("v5p:4x4x8")
  assert (pod.num_devices, pod.device_kind) == (128, "TPU v5")
  assert pod.topology == "v5p:4x4x8"
  assert pod.chip.flops == 4.59e14
  assert pod.hbm == 95.74 * 2**30


@pytest.mark.parametrize(
  ("kind", "count", "topology"),
  [
    ("v5p", 128, "v5p:4x4x8"),
    ("v5p", 512, "v5p:8x8x8"),
    ("v6e", 256, "v6e:16x16"),
    ("v6e", 8, "v6e:2x4"),
    ("v5p", 1, "v5p:1x1x1"),
  ],
)
def test_the_most_compact_of_a_count(kind, count, topology):
  assert Pod.of_count(kind, count).topology == topology


@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v5p", "--topology=v5p: expected a kind and chips"),
    ("v5p:4", "--topology=v5p:4: expected a kind and chips"),
    ("v5p:4x0x4", "--topology=v5p:4x0x4: expected sizes above 0"),
    ("v5p:4x4", "--topology=v5p:4x4: v5p has 3 dimensions; expected sizes"),
    ("v6e:4x4x1", "--topology=v6e:4x4x1: v6e has 2 dimensions; expected sizes"),
    ("v4:2x2x1", "--topology=v4:2x2x1: of v4 no rates are known"),
  ],
)
def test_what_is_no_topology_is_refused(topology, message):
  with pytest.raises(errors.UserError, match=message):
    Pod.of(topology)


@pytest.mark.parametrize(
  ("kind", "count", "message"),
  [
    ("v7", 8, "--kind=v7: of v7 no rates are known"),
    ("v6e", 0, "--devices=0: expected a number above 0"),
    ("v6e", 512, "--devices=512: no torus of v6e has so many chips"),
    ("v5p", 31, "--devices=31: no torus of v5p has so many chips"),
  ],
)
def test_what_is_no_pod_is_refused(kind, count, message):
  with pytest.raises(errors.UserError, match=message):
    Pod.of_count(kind, count)


def test_where_the_axes_of_a_mesh_lie():
  mesh = dict(data=1, fsdp=32, expert=8, tensor=1)
  assert Pod.of("v6e:16x16").placed(mesh) == dict(
    data=(), fsdp=(16, 2), expert=(8,), tensor=()
  )
  # A ring of its own for the last axis that has its size.
  assert Pod.of("v5p:4x4x8").placed(dict(mesh, fsdp=16)) == dict(
    data=(), fsdp=(4, 4), expert=(8,), tensor=()
  )
  assert Pod.of("v5p:2x2x2").placed(dict(mesh, fsdp=1)) == dict(
    data=(), fsdp=(), expert=(2, 2, 2), tensor=()
  )
