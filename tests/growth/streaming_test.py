"""Growth from disk to disk gives the bytes of growth in memory."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import array_store, errors, model_dir
from aquila_jax.core.experiment_config import ScaleOut, ScaleUp
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.growth.calibration import calibrate
from aquila_jax.growth.checking import ReadModel
from aquila_jax.growth.routers import Sample
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.growth.streaming import stream_scale_out, stream_scale_up
from aquila_jax.models import decoder_lm
from tests.growth import tiny
from tests.growth.calibration_test import SAMPLE

WIDE = dict(embed_dim=12, mlp_dim=15, num_heads=8, num_layers=5)

# The bias is float32 in every model, and new in a mixture.
MOE = dataclasses.replace(tiny.MOE, selection_bias=True)


def _quiet(line: str) -> None:
  del line


def _written(source: StoredModel, folder: pathlib.Path) -> pathlib.Path:
  axes = decoder_lm.parameter_axes(source.config)
  model_dir.save_model(folder / "source", source, axes=axes)
  return folder / "source"


def _open(path: pathlib.Path) -> model_dir.ModelReader:
  return model_dir.open_model(path, like=decoder_lm.abstract_params)


def _assert_same(path: pathlib.Path, expected: StoredModel) -> None:
  found = model_dir.load_model(path, like=decoder_lm.abstract_params)
  assert found.config == expected.config
  assert found.lineage == expected.lineage
  assert found.tokenizer == expected.tokenizer
  assert found.stop_tokens == expected.stop_tokens
  assert found.chat_template == expected.chat_template
  for one, other in (
    (found.params, expected.params),
    (found.moments, expected.moments),
    (found.ema, expected.ema),
  ):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _source(dtype: str, **fields) -> StoredModel:
  config = tiny.replace(
    tiny.SOURCE, param_dtype=dtype, compute_dtype=dtype, **fields
  )
  wide = jnp.float64 if dtype == "float64" else jnp.float32
  tree = jax.tree.map(lambda leaf: leaf.astype(wide), tiny.params(config))
  # Numbers of no meaning; how they are written is the same.
  moments = AdamMoments(
    count=jnp.asarray(7, jnp.int32),
    mu=tree,
    nu=jax.tree.map(jnp.square, tree),
  )
  source = tiny.stored(config, moments=moments)
  return dataclasses.replace(
    source,
    ema=jax.tree.map(lambda leaf: leaf * 2, moments.mu),
    stop_tokens=(5,),
    chat_template="{{ messages }}",
  )


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(
  ("options", "moe"),
  [
    (ScaleUp(source="s", method="fpi", width_map="random"), False),
    (ScaleUp(source="s", method="fpi", depth="stack"), True),
    (ScaleUp(source="s", method="aki", optimizer="reset"), False),
    (ScaleUp(source="s", method="aki", aki_residual="own_layer"), True),
    (ScaleUp(source="s", method="aki_pro"), False),
  ],
  ids=["fpi", "fpi_stack_moe", "aki_reset", "aki_own_moe", "aki_pro"],
)
def test_scale_up_writes_the_bytes_of_scale_up(options, moe, dtype, tmp_path):
  source = _source(dtype, moe=MOE if moe else None, qk_norm=moe)
  target = tiny.replace(source.config, **WIDE)
  expected = scale_up(source, target, options, seed=3, name="up")
  returned = stream_scale_up(
    _open(_written(source, tmp_path)),
    tmp_path / "grown",
    target,
    options,
    seed=3,
    name="up",
    progress=_quiet,
  )
  _assert_same(tmp_path / "grown", expected)
  assert returned.lineage == expected.lineage


def test_parameters_take_the_dtype_of_the_target(tmp_path):
  source = _source("float64")
  target = tiny.replace(source.config, param_dtype="bfloat16", **WIDE)
  options = ScaleUp(source="s", method="fpi")
  stream_scale_up(
    _open(_written(source, tmp_path)),
    tmp_path / "grown",
    target,
    dataclasses.replace(options, optimizer="reset"),
    progress=_quiet,
  )
  found = model_dir.load_model(
    tmp_path / "grown", like=decoder_lm.abstract_params
  )
  wanted = scale_up(source, target, options).params
  for a, b in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(wanted), strict=True
  ):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _mixture(config: ModelConfig) -> ModelConfig:
  return tiny.replace(config, moe=MOE)


def _stream_out(
  sources: list[pathlib.Path],
  output: pathlib.Path,
  target: ModelConfig,
  options: ScaleOut,
  *,
  sample: Sample | None = None,
) -> None:
  readers = [_open(path) for path in sources]
  plan = plan_scale_out(readers[0].model.config, target, options)
  calibration = calibrate(
    plan.way,
    ReadModel(config=readers[0].model.config, params=readers[0].params),
    target,
    options,
    sample=sample,
    seed=5,
    path="config.model",
  )
  stream_scale_out(
    readers,
    output,
    plan,
    options,
    calibration=calibration,
    seed=5,
    name="out",
    progress=_quiet,
  )


WAYS: dict[str, tuple[Any, Any, Any]] = {
  "copies": (dict(), dict(num_experts=4), dict()),
  "reset": (dict(optimizer="reset"), dict(num_experts=4), dict()),
  "all at once": (
    dict(method="granular", redraw=0.4, noise=0.2, router="clusters"),
    dict(
      num_experts=6,
      shared_expert_dim=4,
      router_order="softmax_then_topk",
      renormalise=False,
    ),
    dict(mlp_dim=3),
  ),
  "a larger mixture": (
    dict(method="drop_upcycling"),
    dict(num_experts=8, top_k=4),
    dict(),
  ),
  "one FFN by usage": (
    dict(method="merge_by_usage", optimizer="reset"),
    None,
    dict(),
  ),
}


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_scale_out_writes_the_bytes_of_scale_out(way, dtype, tmp_path):
  fields, moe, width = WAYS[way]
  is_mixture = way in ("a larger mixture", "one FFN by usage")
  source = _source(
    dtype,
    tied_embeddings=dtype == "bfloat16",
    moe=tiny.MOE if is_mixture else None,
  )
  made = None if moe is None else dataclasses.replace(tiny.MOE, **moe)
  target = tiny.replace(source.config, moe=made, **width)
  options = ScaleOut(source="s", **fields)
  expected = scale_out(
    source, target, options, sample=SAMPLE, seed=5, name="out"
  )
  _stream_out(
    [_written(source, tmp_path)],
    tmp_path / "grown",
    target,
    options,
    sample=SAMPLE,
  )
  _assert_same(tmp_path / "grown", expected)


def test_models_are_mixed_from_disk_as_in_memory(tmp_path):
  source = _source("float64")
  other = dataclasses.replace(
    source, params=tiny.params(source.config, seed=3), ema=None, moments=None
  )
  options = ScaleOut(
    source="s", method="branch_train_mix", sources=("o",), optimizer="reset"
  )
  target = _mixture(source.config)
  paths = []
  for name, model in (("one", source), ("two", other)):
    (tmp_path / name).mkdir()
    paths.append(_written(model, tmp_path / name))
  _stream_out(paths, tmp_path / "grown", target, options)
  expected = scale_out(
    source, target, options, others=[other], seed=5, name="out"
  )
  # An average that not all of them have is left out.
  assert expected.ema is None
  _assert_same(tmp_path / "grown", expected)


def test_no_more_than_a_layer_of_a_leaf_is_read_or_written(
  tmp_path, monkeypatch
):
  """What bounds the memory, whatever the size of the model."""
  source = dataclasses.replace(_source("float64"), moments=None, ema=None)
  path = _written(source, tmp_path)
  largest = 0
  read, write = array_store.TreeReader.read, array_store.TreeWriter.write

  def seen_read(self, name, *, index=()):
    nonlocal largest
    value = read(self, name, index=index)
    largest = max(largest, value.size)
    return value

  def seen_write(self, name, value, *, index=()):
    nonlocal largest
    largest = max(largest, np.asarray(value).size)
    write(self, name, value, index=index)

  monkeypatch.setattr(array_store.TreeReader, "read", seen_read)
  monkeypatch.setattr(array_store.TreeWriter, "write", seen_write)
  _stream_out(
    [path],
    tmp_path / "grown",
    _mixture(source.config),
    ScaleOut(source="s"),
  )
  # The query kernel of one layer, [D, N, H]; the router, the embedding and the
  # head, of one piece, are smaller.
  assert largest == 8 * 6 * 4


def test_a_damaged_source_leaves_nothing_behind(tmp_path):
  source = dataclasses.replace(_source("float64"), moments=None, ema=None)
  path = _written(source, tmp_path)
  chunk = path / "params/layers.mlp.down_kernel/c/2/0/0"
  content = bytearray(chunk.read_bytes())
  content[3] ^= 1
  chunk.write_bytes(bytes(content))
  with pytest.raises(errors.UserError) as error:
    _stream_out(
      [path],
      tmp_path / "grown",
      _mixture(source.config),
      ScaleOut(source="s"),
    )
  assert str(error.value).startswith(
    f"{path}/params: leaf 'layers.mlp.down_kernel' is damaged: "
  )
  assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
