"""The Pallas kernels for TPUs, interpreted; `make tpu` compiles them."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from aquila_jax.kernels.expert_ffn import pallas_tpu, reference, tpu_tiles
from aquila_jax.kernels.expert_ffn.tpu_passes import Operands
from aquila_jax.kernels.expert_ffn.tpu_visits import Visits
from tests.kernels.expert_ffn import contract

_CALL = jax.jit(
  functools.partial(pallas_tpu.expert_ffn, interpret=True),
  static_argnames=("tile_rows", "device_kind"),
)


_REFERENCE = jax.jit(reference.expert_ffn)

# Where one kernel takes rows through all of an expert, and where two do.
_KINDS = ("TPU v6 lite", "TPU v5")


class TestPallasTpu(contract.ExpertFfnContract):
  implementation = "pallas_tpu"

  def _call(self):
    return functools.partial(_CALL, device_kind=_KINDS[0])


class TestPallasTpuOfTwoCores(contract.ExpertFfnContract):
  implementation = "pallas_tpu"

  def _call(self):
    return functools.partial(_CALL, device_kind=_KINDS[1])


def _case(loads, *, num_blocks, size=8, width=24, hidden=40):
  """Blocks by expert; the blocks that are not in use hold NaN."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  experts, used = len(loads), sum(loads)
  kernels = (
    normal(experts, width, hidden) / 5,
    normal(experts, width, hidden) / 5,
    normal(experts, hidden, width) / 5,
  )
  block_expert = np.repeat(np.arange(experts), loads)
  spare = np.full(num_blocks - used, experts - 1)
  rows, grad = normal(num_blocks, size, width), normal(num_blocks, size, width)
  blocks = dict(
    block_expert=jnp.asarray(np.concatenate([block_expert, spare]), jnp.int32),
    num_blocks=jnp.asarray(used, jnp.int32),
  )
  return rows, kernels, grad, blocks


def _run(call, rows, kernels, grad, blocks):
  out, pull = jax.vjp(lambda *a: call(*a, **blocks), rows, kernels)
  return out, *pull(grad)


def _agree(found, expected):
  # Sums of up to 20 blocks * 16 rows products of numbers near 1, behind a chain
  # of three: 3 * 320 * 2^-24 = 6e-5.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=6e-5, rtol=1e-5),
    found,
    expected,
  )


_meeting = pytest.mark.parametrize(
  ("loads", "tile_rows"),
  list(
    itertools.product(
      [(3, 0, 3, 2), (0, 9, 0, 0), (0, 0, 1, 6)], [(8, 16), (32, 256)]
    )
  ),
  ids=str,
)


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("kind", _KINDS)
@_meeting
def test_tiles_in_which_experts_meet(loads, tile_rows, kind):
  """Tiles of one to all blocks: experts begin and end inside of them."""
  rows, kernels, grad, blocks = _case(loads, num_blocks=9)
  expected = _run(_REFERENCE, rows, kernels, grad, blocks)
  spoilt = rows.at[sum(loads) :].set(jnp.nan)
  call = functools.partial(_CALL, tile_rows=tile_rows, device_kind=kind)
  _agree(_run(call, spoilt, kernels, grad, blocks), expected)


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("kind", _KINDS)
@_meeting
def test_tiles_in_which_experts_meet_in_half_precision(loads, tile_rows, kind):
  """Beside float32 of the same numbers, in the norm of each array."""
  *case, blocks = _case(loads, num_blocks=9)
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), case)
  rows, kernels, grad = jax.tree.map(lambda a: a.astype(jnp.float32), half)
  expected = _run(_REFERENCE, rows, kernels, grad, blocks)
  rows, kernels, grad = half
  spoilt = rows.at[sum(loads) :].set(jnp.nan)
  call = functools.partial(_CALL, tile_rows=tile_rows, device_kind=kind)
  found = _run(call, spoilt, kernels, grad, blocks)
  # Five roundings in a chain, each of 2^-8 at most: of g and of u, of their
  # gradients, of the result, and g's once more by the curvature of silu.
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == jnp.bfloat16
    error = jnp.linalg.norm(a.astype(jnp.float32) - b)
    assert error <= 5 * 2**-8 * jnp.linalg.norm(b)
  np.testing.assert_array_equal(found[1][sum(loads) :], 0)


@pytest.mark.parametrize(
  ("width", "hidden", "behind"), [(256, 2304, ""), (128, 16384, "_deep")]
)
def test_one_core_whose_memory_an_expert_exceeds(width, hidden, behind):
  """16 MiB: gate, up and down of one are more; so is a tile of all units."""
  rows, kernels, grad, blocks = _case(
    (1, 0, 3), num_blocks=5, width=width, hidden=hidden
  )
  kernels = jax.tree.map(lambda kernel: kernel * 12 / hidden**0.5, kernels)
  call = functools.partial(_CALL, tile_rows=(16, 16), device_kind="TPU v3")
  assert _kernels_of(call, rows, kernels, blocks) == {
    "expert_ffn",  # the function itself
    *pallas_tpu.OF_KERNELS,
    "expert_gate_up",
    f"expert_down{behind}",
    "expert_hidden_gradients",
    f"expert_rows_gradient{behind}",
  }
  _agree(
    _run(call, rows, kernels, grad, blocks),
    _run(_REFERENCE, rows, kernels, grad, blocks),
  )


_ONE = {"expert_hidden_and_output", "expert_hidden_and_rows_gradients"}
_TWO = {
  "expert_gate_up",
  "expert_down",
  "expert_hidden_gradients",
  "expert_rows_gradient",
}


def _kernels_of(call, rows, kernels, blocks) -> set[str]:
  """Names of the kernels of an output with its gradients."""

  def run(rows, kernels, blocks):
    out, pull = jax.vjp(lambda *a: call(*a, **blocks), rows, kernels)
    return out, *pull(out)

  text = str(jax.make_jaxpr(run)(rows, kernels, blocks))
  return set(re.findall(r"name=(expert_\w+)", text))


@pytest.mark.parametrize(
  ("kind", "hidden", "is_one"),
  [
    ("TPU v6 lite", 704, True),
    ("TPU v5 lite", 704, True),
    ("TPU v6 lite", 5632, False),  # 132 MiB of kernels, this and the next
    ("TPU v5", 704, False),  # two cores share tiles of columns
    ("TPU v3", 704, False),  # 16 MiB
  ],
)
def test_rows_are_visited_once_where_an_expert_fits(kind, hidden, is_one):
  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)

  into = array(8, 2048, hidden)
  found = _kernels_of(
    functools.partial(_CALL, device_kind=kind),
    array(12, 64, 2048),
    (into, into, array(8, hidden, 2048)),
    dict(
      block_expert=array(12, dtype=jnp.int32),
      num_blocks=array(dtype=jnp.int32),
    ),
  )
  assert found & (_ONE | _TWO) == (_ONE if is_one else _TWO)


def test_halves_of_a_tile_and_columns_in_tiles():
  """Two cores share columns: 320 are a tile of 256 and a cut one."""
  rows, kernels, grad, blocks = _case(
    (7, 0, 4, 6), num_blocks=20, size=16, width=136, hidden=320
  )
  call = functools.partial(_CALL, tile_rows=(64, 256), device_kind="TPU v5p")
  kernels = jax.tree.map(lambda kernel: kernel / 3, kernels)
  _agree(
    _run(call, rows, kernels, grad, blocks),
    _run(_REFERENCE, rows, kernels, grad, blocks),
  )


def test_shards_that_share_kernels_get_the_sum_of_gradients():
  """Inside of shard_map, whose rows are the shard's; types: tests/tpu."""
  rows, kernels, grad, blocks = _case((1, 1, 0, 0), num_blocks=2)
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))

  def loss(rows, kernels, grad):
    def shard(rows, kernels, grad):
      out = pallas_tpu.expert_ffn(
        rows,
        kernels,
        block_expert=jnp.zeros(1, jnp.int32),
        num_blocks=jnp.ones((), jnp.int32),
        interpret=True,
      )
      return jax.lax.psum(jnp.sum(out * grad), "data")

    return jax.shard_map(
      shard,
      mesh=mesh,
      in_specs=(P("data"), P(), P("data")),
      out_specs=P(),
      check_vma=False,  # the interpreter's index maps have no types
    )(rows, kernels, grad)

  found = jax.jit(jax.grad(loss, (0, 1)))(rows, kernels, grad)
  blocks["block_expert"] = jnp.zeros(2, jnp.int32)
  expected = _run(_REFERENCE, rows, kernels, grad, blocks)[1:]
  _agree(found, expected)


def test_visits_by_hand():
  """Rows 5, 0, 3 of 12, in tiles of 4: tile 1 is both experts'."""
  loads = jnp.asarray([5, 0, 3], jnp.int32)
  visits = Visits.of_rows(loads, num_rows=12, tile_rows=4, empty_experts=False)
  # The last of six steps is not needed, and has no rows.
  assert visits.tile.tolist() == [0, 1, 1, 2, 2, 2]
  assert visits.expert.tolist() == [0, 0, 2, 2, 2, 2]
  assert visits.first.tolist() == [0, 0, 1, 0, 0, 0]
  assert visits.end.tolist() == [4, 1, 4, 0, 0, 0]
  visits = Visits.of_rows(loads, num_rows=12, tile_rows=4, empty_experts=True)
  assert visits.tile.tolist() == [0, 1, 1, 1, 1, 1]
  assert visits.expert.tolist() == [0, 0, 1, 2, 2, 2]
  assert (visits.end - visits.first).tolist() == [4, 1, 0, 3, 0, 0]


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="there is one")
def test_without_a_tpu_it_is_refused():
  rows, kernels, block_expert, used = contract.inputs()
  with pytest.raises(NotImplementedError) as error:
    pallas_tpu.expert_ffn(
      rows, kernels, block_expert=block_expert, num_blocks=used
    )
  assert str(error.value) == "implementation='pallas_tpu' needs a TPU"


def test_other_dtypes_are_refused():
  rows, kernels, block_expert, used = contract.inputs()
  with pytest.raises(NotImplementedError) as error:
    pallas_tpu.expert_ffn(
      rows.astype(jnp.bfloat16),
      kernels,
      block_expert=block_expert,
      num_blocks=used,
      interpret=True,
    )
  assert str(error.value) == (
    "implementation='pallas_tpu': rows and kernels of bfloat16, float32;"
    " need all bfloat16 or all float32"
  )


@pytest.mark.parametrize(
  # Mixtral's, AquilaMoE-8x16B's
  ("width", "hidden", "rows"),
  [(4096, 14336, 256), (5120, 20480, 128)],
)
def test_a_tile_of_rows_fits_beside_wide_experts(width, hidden, rows):
  """Where a step takes all that is summed over: two gradients of units."""
  chip = tpu_tiles.Chip.of(
    "TPU v5", rows=256, outer_rows=512, deep_rows=1024, interpret=False
  )

  def check(x, kernel):
    operands = Operands(whole=[x, x], kernels=2 * [(kernel, 1)], num_outputs=1)
    assert operands.rows_that_fit(chip) == rows
    assert operands.held(128, tile_rows=rows) <= chip.budget

  jax.eval_shape(
    check,
    jax.ShapeDtypeStruct((1024, hidden), jnp.bfloat16),
    jax.ShapeDtypeStruct((8, width, hidden), jnp.bfloat16),
  )
