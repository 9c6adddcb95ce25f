"""Rows whose tokens lie on several devices: the same outputs and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aquila_jax.core import token_order
from aquila_jax.kernels.attention import api, chunked, reference, splash
from aquila_jax.kernels.attention.mesh_axes import MeshAxes
from tests.kernels.attention import contract

_AXES = MeshAxes(
  rows=("data", "fsdp"), kv_heads=("tensor",), tokens=("sequence",)
)
_MESHES = {
  2: dict(data=2, sequence=2, tensor=2),
  4: dict(data=1, sequence=4, tensor=2),
  8: dict(sequence=8),
}


def _mesh(parts: int):
  sizes = _MESHES[parts]
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
  )


def _with_gradients(call, query, key, value, segments, upstream):
  out, pull = jax.vjp(
    functools.partial(call, segments=segments), query, key, value
  )
  return out, pull(upstream)


def _check(case: contract.Case, parts: int, call) -> str:
  """Compares with the reference; gives the compiled program."""
  mesh, axes = _mesh(parts), _AXES.of(_mesh(parts).abstract_mesh)
  *arguments, upstream = contract.inputs(case)
  given = (*arguments, jnp.asarray(contract.segments(case)), upstream)
  whole = functools.partial(reference.causal_attention, window=case.window)
  expected = jax.jit(functools.partial(_with_gradients, whole))(*given)
  order = token_order.token_order(case.length, parts)

  def divided(*x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return _with_gradients(functools.partial(call, window=case.window), *x)

  placed = [
    jax.device_put(
      x[:, order],
      NamedSharding(mesh, axes.every_token if x.ndim == 2 else axes.heads),
    )
    for x in given
  ]
  compiled = jax.jit(divided).lower(*placed).compile()
  jax.tree.map(
    lambda a, b: contract.assert_close(
      a, np.asarray(b)[:, order], dtype=jnp.float32
    ),
    compiled(*placed),
    expected,
  )
  return compiled.as_text() or ""


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("window", [None, 1, 23])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_equals_undivided_attention(monkeypatch, implementation, parts, window):
  monkeypatch.setattr(chunked, "BLOCK", 2)  # chunks of 3: a block and a rest
  case = contract.Case(
    length=6 * parts, window=window, packing="odd" if window else "packed"
  )
  call = functools.partial(
    api.causal_attention, implementation=implementation, mesh_axes=_AXES
  )
  text = _check(case, parts, call)
  # Keys and values come, and their gradients go; queries stay.
  assert "all-gather" in text
  assert "all-to-all" not in text


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize(("parts", "window"), [(2, None), (2, 100), (4, 300)])
def test_splash_equals_undivided_attention(monkeypatch, parts, window):
  monkeypatch.setattr(splash, "_BLOCK", 128)
  case = contract.Case(length=256 * parts, head_dim=16, window=window)
  call = functools.partial(
    splash.causal_attention, mesh_axes=_AXES, interpret=True
  )
  _check(case, parts, call)


def test_rows_that_the_mesh_does_not_divide_lie_on_all_of_it():
  """Two rows on a mesh for four of them."""
  case = contract.Case(length=16, num_kv_heads=3, group_size=1)
  mesh = jax.make_mesh(
    (4, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2
  )
  *arguments, _ = contract.inputs(case)
  segments = jnp.asarray(contract.segments(case))
  order = token_order.token_order(16, 2)

  @jax.jit
  def divided(*x):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return api.causal_attention(
        *(each[:, order] for each in x),
        segments=segments[:, order],
        implementation="xla",
        mesh_axes=_AXES,
      )

  expected = reference.causal_attention(*arguments, segments=segments)
  everywhere = NamedSharding(mesh, PartitionSpec())
  contract.assert_close(
    divided(*jax.device_put(arguments, everywhere)),
    np.asarray(expected)[:, order],
    dtype=jnp.float32,
  )


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_every_device_has_as_much_to_do(parts):
  """Of a causal mask, by counting."""
  length = 12 * parts
  order = token_order.token_order(length, parts)
  assert sorted(order) == list(range(length))
  seen = (order + 1).reshape(parts, -1).sum(axis=1)
  assert len(set(seen)) == 1
  # Those of a device are in the order of the row.
  assert np.all(np.diff(order.reshape(parts, -1), axis=1) > 0)
