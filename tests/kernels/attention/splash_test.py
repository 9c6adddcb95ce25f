"""The splash kernel, interpreted, on one device and on eight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aquila_jax.kernels.attention import reference, splash
from aquila_jax.kernels.attention.mesh_axes import UNDIVIDED, MeshAxes
from tests.kernels.attention import contract


class TestSplash(contract.AttentionContract):
  """Two blocks, and a head that is narrower than the kernel's lanes."""

  cases = contract.product(length=256, head_dim=16, windows=(None, 1, 100))[::5]

  @pytest.fixture(autouse=True)
  def _small_blocks(self, monkeypatch):
    monkeypatch.setattr(splash, "_BLOCK", 128)

  def call(self, query, key, value, *, segments, window):
    return splash.causal_attention(
      query, key, value, segments=segments, window=window, interpret=True
    )


def test_blocks_divide_rows_that_are_no_power_of_two():
  """T = 384, in blocks of 128, and a window beyond it."""
  case = contract.Case(length=384, head_dim=16, window=500, num_kv_heads=1)
  *arguments, upstream = contract.inputs(case)
  rows = contract.segments(case)
  expected, _ = contract.by_loops(
    arguments, upstream, segments=rows, window=None
  )
  found = splash.causal_attention(
    *arguments, segments=jnp.asarray(rows), window=500, interpret=True
  )
  contract.assert_close(found, expected, dtype=jnp.float32)


def _mesh():
  """Rows over data and expert, heads over tensor."""
  names = ("data", "expert", "tensor")
  return jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)


_AXES = MeshAxes(rows=("data", "fsdp", "expert"), kv_heads=("tensor",))


def test_divided_over_a_mesh_equals_the_reference_and_moves_nothing():
  mesh = _mesh()
  rows = PartitionSpec(("data", "expert"))
  heads = PartitionSpec(("data", "expert"), None, "tensor")
  case = contract.Case(length=128, head_dim=16)
  # (2, ...) -> (4, ...), a row on each of four parts of the mesh.
  *arguments, upstream = (
    jnp.tile(x, (2, *[1] * (x.ndim - 1))) for x in contract.inputs(case)
  )
  segments = jnp.asarray(np.tile(contract.segments(case), (2, 1)))

  def both(call, query, key, value, segments, upstream):
    out, pull = jax.vjp(
      functools.partial(call, segments=segments, window=20), query, key, value
    )
    return out, pull(upstream)

  def divided(*x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      call = functools.partial(
        splash.causal_attention, mesh_axes=_AXES, interpret=True
      )
      return both(call, *x)

  given = (*arguments, segments, upstream)
  specs = (heads, heads, heads, rows, heads)
  placed = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(given, specs, strict=True)
  ]
  compiled = jax.jit(divided).lower(*placed).compile()
  found = compiled(*placed)
  expected = jax.jit(functools.partial(both, reference.causal_attention))(
    *given
  )
  jax.tree.map(
    lambda a, b: contract.assert_close(a, np.asarray(b), dtype=jnp.float32),
    found,
    expected,
  )
  text = compiled.as_text()
  assert text is not None
  for moved in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert moved not in text
  for leaf in jax.tree.leaves(found):
    assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, heads), leaf.ndim)


def _query(shape=(2, 128, 2, 2, 16), dtype=jnp.float32):
  return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
  ("query", "on_mesh", "reason"),
  [
    (
      _query((2, 200, 2, 2, 16)),
      True,
      "splash needs T to be a multiple of 128; T=200",
    ),
    (
      _query(dtype=jnp.float16),
      True,
      "splash needs float32 or bfloat16, not float16",
    ),
    (
      _query(),
      False,
      "splash is divided by shard_map: with several devices it needs a mesh in"
      " the context, by jax.sharding.use_abstract_mesh or jax.set_mesh",
    ),
    (
      _query(),
      True,
      "splash needs B to be a multiple of its parts on the mesh; B=2, parts=4",
    ),
    (
      _query((4, 128, 3, 2, 16)),
      True,
      "splash needs K to be a multiple of its parts on the mesh; K=3, parts=2",
    ),
  ],
)
def test_what_it_cannot_do_is_refused(query, on_mesh, reason):
  with pytest.raises(NotImplementedError) as error:
    if on_mesh:
      with jax.sharding.use_abstract_mesh(_mesh().abstract_mesh):
        splash.check(query, mesh_axes=_AXES)
    else:
      splash.check(query, mesh_axes=_AXES)
  assert str(error.value) == reason


def test_one_device_needs_no_mesh(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  splash.check(_query(), mesh_axes=UNDIVIDED)


@pytest.mark.parametrize(
  ("length", "num_parts", "window", "share"),
  [
    # 4 x 4 blocks of 1,024, of which 6 lie above the diagonal.
    (4096, 1, None, 10 / 16),
    # A row of chunks of 512 on 4 devices: 8 x 4 blocks, and 4 + 8 + 8 are met.
    (4096, 4, None, 20 / 32),
    (1024, 1, None, 1.0),
    # Two blocks a query block, but one for the first.
    (4096, 1, 1024, 7 / 8),
  ],
)
def test_share_of_blocks_that_are_computed(length, num_parts, window, share):
  found = splash.computed_share(
    length,
    head_dim=128,
    dtype=jnp.bfloat16,
    num_parts=num_parts,
    window=window,
  )
  assert found == share
