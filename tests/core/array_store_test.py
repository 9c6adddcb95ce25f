"""Arrays on disk: exact, sliceable, Orbax's layout, never silently wrong."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath

from aquila_jax.core import array_store
from aquila_jax.core.axes import LeafAxes, neither, reads, writes
from aquila_jax.core.errors import UserError

AXES = {
  "layers": {
    "mlp": LeafAxes(
      (neither("layer"), neither("expert"), reads("embed"), writes("mlp"))
    ),
    "norm": LeafAxes((neither("layer"), writes("embed"))),
  },
  "table": LeafAxes((neither("vocab"), writes("embed"))),
  "count": LeafAxes(()),
}


def _tree():
  rng = np.random.default_rng(0)
  return {
    "layers": {
      "mlp": rng.normal(size=(3, 2, 4, 5)).astype(np.float32),
      "norm": np.ones((3, 4), np.float32),
    },
    "table": jnp.asarray(rng.normal(size=(7, 4)), jnp.bfloat16),
    "count": np.asarray(17, np.int32),
  }


def _write(tmp_path: pathlib.Path, tree=None) -> epath.Path:
  directory = epath.Path(tmp_path) / "params"
  array_store.write_tree(directory, tree or _tree(), axes=AXES)
  return directory


def _assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)

  def check(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

  jax.tree.map(check, found, expected)


@pytest.mark.parametrize(
  ("shape", "axes", "itemsize", "chunk"),
  [
    # One layer of one expert a chunk.
    ((3, 2, 4, 5), AXES["layers"]["mlp"], 4, (1, 1, 4, 5)),
    ((7, 4), AXES["table"], 4, (7, 4)),
    # A router writes expert: it is one matrix, not a stack.
    ((8, 4), LeafAxes((reads("embed"), writes("expert"))), 4, (8, 4)),
    ((), AXES["count"], 4, ()),
    # 151,851 x 5,120 x 4 bytes is 2.9 GiB: 2^28 bytes are at most 13,107 rows.
    ((151_851, 5120), AXES["table"], 4, (9491, 5120)),
  ],
)
def test_chunk_is_a_layer_and_at_most_256_mib(shape, axes, itemsize, chunk):
  found = array_store.chunk_shape(shape, axes, itemsize=itemsize)
  assert found == chunk
  assert np.prod(found, dtype=int) * itemsize <= 2**28


def test_round_trip_is_exact(tmp_path):
  _assert_equal(array_store.read_tree(_write(tmp_path), _tree()), _tree())


def test_orbax_restores_what_is_written(tmp_path):
  directory = _write(tmp_path)
  with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True) as orbax:
    restored = orbax.restore(
      directory,
      restore_args=jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _tree()
      ),
    )
  _assert_equal(restored, jax.tree.map(np.asarray, _tree()))


def test_what_orbax_saves_is_read(tmp_path):
  directory = epath.Path(tmp_path) / "saved"
  with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True) as orbax:
    orbax.save(directory, jax.tree.map(jnp.asarray, _tree()))
  _assert_equal(array_store.read_tree(directory, _tree()), _tree())


def test_tensorstore_alone_reads_a_layer(tmp_path):
  path = _write(tmp_path) / "layers.mlp"
  store = ts.open(
    {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
  ).result()
  np.testing.assert_array_equal(
    store[1, :, 2].read().result(), _tree()["layers"]["mlp"][1, :, 2]
  )


@pytest.mark.parametrize("leaf", ["layers.mlp", "layers.norm", "table"])
def test_flipped_bit_in_an_array_is_found(tmp_path, leaf):
  directory = _write(tmp_path)
  chunks = pathlib.Path(directory / leaf).glob("c/**/*")
  chunk = next(path for path in chunks if path.is_file())
  whole = chunk.read_bytes()
  for bit in range(0, 8 * len(whole), 37):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    chunk.write_bytes(bytes(damaged))
    with pytest.raises(UserError) as error:
      array_store.read_tree(directory, _tree())
    assert str(error.value).startswith(
      f"{directory}: leaf {leaf!r} is damaged: "
    )
    assert "\n" not in str(error.value)


def test_flipped_bit_in_metadata_never_changes_a_value(tmp_path):
  directory = _write(tmp_path)
  path = directory / "layers.norm" / "zarr.json"
  whole = path.read_bytes()
  refused = 0
  for bit in range(0, 8 * len(whole), 11):
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(damaged))
    try:
      tree = array_store.read_tree(directory, _tree())
    except UserError as error:
      refused += 1
      assert "'layers.norm'" in str(error)
    else:  # It hit what carries no meaning.
      _assert_equal(tree, _tree())
  assert refused > 100


def test_missing_chunk_is_found_also_of_zeros(tmp_path):
  tree = _tree()
  tree["layers"]["norm"] = np.zeros((3, 4), np.float32)
  directory = _write(tmp_path, tree)
  chunk = directory / "layers.norm" / "c" / "1" / "0"
  chunk.unlink()
  with pytest.raises(UserError) as error:
    array_store.read_tree(directory, tree)
  assert str(error.value).startswith(
    f"{directory}: leaf 'layers.norm' is damaged: "
  )


def test_cut_chunk_is_found(tmp_path):
  directory = _write(tmp_path)
  chunk = directory / "table" / "c" / "0" / "0"
  chunk.write_bytes(chunk.read_bytes()[:-5])
  with pytest.raises(UserError) as error:
    array_store.read_tree(directory, _tree())
  assert str(error.value).startswith(f"{directory}: leaf 'table' is damaged: ")


def test_leaf_that_is_left_over_is_named(tmp_path):
  directory = _write(tmp_path)
  like = _tree()
  del like["layers"]["norm"]
  with pytest.raises(UserError) as error:
    array_store.read_tree(directory, like)
  assert str(error.value) == (
    f"{directory}: leaf 'layers.norm' is not of this model"
  )


def test_leaf_that_is_missing_is_named(tmp_path):
  directory = _write(tmp_path)
  like = _tree()
  like["layers"]["bias"] = like["layers"]["norm"]
  with pytest.raises(UserError) as error:
    array_store.read_tree(directory, like)
  assert str(error.value) == f"{directory}: leaf 'layers.bias' is missing"


@pytest.mark.parametrize(
  ("shape", "dtype", "needed"),
  [
    ((3, 5), np.float32, "float32[3, 5]"),
    ((3, 4), jnp.bfloat16, "bfloat16[3, 4]"),
  ],
)
def test_leaf_of_another_shape_or_dtype_is_named(
  tmp_path, shape, dtype, needed
):
  directory = _write(tmp_path)
  like = _tree()
  like["layers"]["norm"] = jax.ShapeDtypeStruct(shape, dtype)
  with pytest.raises(UserError) as error:
    array_store.read_tree(directory, like)
  assert str(error.value) == (
    f"{directory}: leaf 'layers.norm' is float32[3, 4], the configuration"
    f" needs {needed}"
  )
