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
    # Rows as growth takes them; 2^28 bytes are at most 4,096 of these.
    ((151_851, 5120), AXES["table"], 4, (8192, 5120)),
    ((151_851, 2**14), AXES["table"], 4, (4096, 2**14)),
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


def _like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _writer(tmp_path: pathlib.Path) -> array_store.TreeWriter:
  directory = epath.Path(tmp_path) / "params"
  return array_store.TreeWriter(directory, _like(_tree()), axes=AXES)


def _write_all_but(writer: array_store.TreeWriter, *names: str) -> None:
  tree = _tree()
  for name, leaf in {
    "layers.mlp": tree["layers"]["mlp"],
    "layers.norm": tree["layers"]["norm"],
    "table": tree["table"],
    "count": tree["count"],
  }.items():
    if name not in names:
      writer.write(name, leaf)


def test_slices_in_any_order_write_what_the_whole_tree_writes(tmp_path):
  writer = _writer(tmp_path / "a")
  _write_all_but(writer, "layers.mlp", "layers.norm")
  mlp, norm = _tree()["layers"]["mlp"], _tree()["layers"]["norm"]
  for layer in (2, 0, 1):
    writer.write("layers.norm", norm[layer], index=(layer,))
  writer.write("layers.mlp", mlp[1], index=(1,))
  for layer, expert in [(2, 1), (0, 0), (2, 0), (0, 1)]:
    writer.write("layers.mlp", mlp[layer, expert], index=(layer, expert))
  writer.close()
  whole = _write(tmp_path / "b")
  files = {
    str(path.relative_to(folder)): path.read_bytes()
    for folder in (tmp_path / "a", tmp_path / "b")
    for path in folder.rglob("*")
    if path.is_file()
  }
  for name, content in files.items():
    assert (tmp_path / "a" / name).read_bytes() == content, name
  _assert_equal(array_store.read_tree(whole, _tree()), _tree())


@pytest.mark.parametrize(
  ("written", "message"),
  [
    ((), r"\{'layers.norm': 12\}"),
    ((0, 1), r"\{'layers.norm': 4\}"),
    ((0, 1, 2, 2), r"\{'layers.norm': -4\}"),
  ],
)
def test_a_tree_that_is_not_written_once_is_our_fault(
  tmp_path, written, message
):
  writer = _writer(tmp_path)
  _write_all_but(writer, "layers.norm")
  for layer in written:
    writer.write("layers.norm", np.ones(4, np.float32), index=(layer,))
  with pytest.raises(
    AssertionError, match=f"not written, or written twice: {message}"
  ):
    writer.close()
  assert not (tmp_path / "params" / "_METADATA").exists()


@pytest.mark.parametrize(
  ("value", "index", "message"),
  [
    (np.ones(4, np.float64), (0,), "'layers.norm', dtype.'float64'"),
    (np.ones(5, np.float32), (0,), r"'layers.norm', \(5,\)"),
    (np.ones(4, np.float32), (), r"'layers.norm', \(4,\)"),
  ],
)
def test_a_slice_of_another_shape_or_dtype_is_our_fault(
  tmp_path, value, index, message
):
  with pytest.raises(AssertionError, match=message):
    _writer(tmp_path).write("layers.norm", value, index=index)


def test_slices_are_read_alone(tmp_path):
  directory = _write(tmp_path)
  reader = array_store.TreeReader(directory, _like(_tree()))
  mlp = _tree()["layers"]["mlp"]
  np.testing.assert_array_equal(reader.read("layers.mlp"), mlp)
  np.testing.assert_array_equal(reader.read("layers.mlp", index=(1,)), mlp[1])
  np.testing.assert_array_equal(
    reader.read("layers.mlp", index=(2, 1)), mlp[2, 1]
  )
  assert reader.read("count").shape == ()
  started = [reader.start("layers.mlp", index=(i,)) for i in range(3)]
  for i, read in reversed(list(enumerate(started))):
    np.testing.assert_array_equal(reader.finish("layers.mlp", read), mlp[i])
  # A layer is a chunk: damage in one is found where it is read, and only there.
  chunk = directory / "layers.mlp" / "c" / "1" / "0" / "0" / "0"
  damaged = bytearray(chunk.read_bytes())
  damaged[3] ^= 1
  chunk.write_bytes(bytes(damaged))
  np.testing.assert_array_equal(reader.read("layers.mlp", index=(2,)), mlp[2])
  with pytest.raises(UserError) as error:
    reader.read("layers.mlp", index=(1,))
  assert str(error.value).startswith(
    f"{directory}: leaf 'layers.mlp' is damaged: "
  )


def test_a_reader_of_nothing_says_so(tmp_path):
  missing = epath.Path(tmp_path) / "params"
  with pytest.raises(UserError) as error:
    array_store.TreeReader(missing, _like(_tree()))
  assert str(error.value) == f"{missing} is missing; this MODEL is not whole"
