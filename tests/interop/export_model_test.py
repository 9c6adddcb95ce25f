"""Exports: what a stock tool finds, and what an import gives back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from aquila_jax.core.errors import UserError
from aquila_jax.core.lineage import Event
from aquila_jax.core.moments import AdamMoments
from aquila_jax.interop.export_model import export_model
from tests.interop import tiny

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def _export(tmp_path, model, **options):
  source = tiny.save(tmp_path / "model", model)
  exported = export_model(
    source, tmp_path / "out", progress=tiny.silent, **options
  )
  return exported, tmp_path / "out"


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("name", tiny.KINDS)
def test_an_import_of_an_export_is_the_same_model_bit_for_bit(tmp_path, name):
  config, architecture = tiny.KINDS[name]
  model = tiny.stored(
    dataclasses.replace(config, remat="full", init_std=0.3),
    tokenizer=tiny.tokenizer_json(),
    stop_tokens=(7, 3),
    chat_template="{{ a }}\r\n\n字",
  )
  exported, path = _export(tmp_path, model)
  assert exported.architecture == architecture
  back = tiny.imported(path, tmp_path / "back")
  tiny.assert_same(back.params, model.params)
  event = Event(
    kind="import",
    parent=str(path),
    options={
      "family": json.loads((path / "config.json").read_text())["model_type"]
    },
  )
  assert dataclasses.replace(back, params=None) == dataclasses.replace(
    model, params=None, lineage=model.lineage.then(event)
  )


# Those whose class has leaves of zeros that the model has not, and one that it
# fits.
@pytest.mark.parametrize(
  "name",
  [
    "window",
    "out bias",
    "experts, qkv bias",
    "qk_norm, qkv bias, window, tied",
  ],
)
def test_without_its_record_an_export_computes_the_same(tmp_path, name):
  config, _ = tiny.KINDS[name]
  model = tiny.stored(config)
  _, path = _export(tmp_path, model)
  (path / "aquila_jax.json").unlink()
  back = tiny.imported(path, tmp_path / "back")
  assert [event.kind for event in back.lineage.events] == ["import"]
  # Zeros are added and nothing is rounded, but products with them are summed in
  # another order: 10 in a row of 8 numbers each, 10 sqrt(8) = 28 roundings of
  # 2^-24, of the largest logit.
  expected = tiny.logits(model, IDS)
  tolerance = 28 * 2.0**-24 * np.max(np.abs(expected))
  np.testing.assert_allclose(
    tiny.logits(back, IDS), expected, rtol=0, atol=tolerance
  )


def test_files_of_an_export(tmp_path):
  config = dataclasses.replace(tiny.DENSE, vocab_size=11)
  lines: list[str] = []
  source = tiny.save(
    tmp_path / "model",
    tiny.stored(
      config,
      tokenizer=tiny.tokenizer_json(),
      stop_tokens=(3,),
      chat_template="{{ x }}",
    ),
  )
  out = tmp_path / "out"
  exported = export_model(source, out, progress=lines.append)
  assert tiny.contents(out) == [
    "aquila_jax.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  assert lines == ["model.safetensors: 21 tensors"]
  assert exported.num_tensors == 21
  # Embedding and head 2 * 11 * 8; a layer: q and o 2 * 8 * 16, k and v 2 * 8 *
  # 8, FFN 3 * 8 * 6, norms 2 * 8; a last norm of 8: 1,400 elements of 4 bytes.
  assert exported.num_bytes == 4 * (176 + 2 * (256 + 128 + 144 + 16) + 8)
  assert exported.num_shards == 1
  with safetensors.safe_open(out / "model.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}
  assert (out / "tokenizer.json").read_text() == tiny.tokenizer_json()
  read = {
    name: json.loads((out / name).read_text())
    for name in (
      "config.json",
      "generation_config.json",
      "tokenizer_config.json",
    )
  }
  assert read["generation_config.json"] == {
    "_from_model_config": True,
    "bos_token_id": None,
    "eos_token_id": 3,
  }
  assert read["tokenizer_config.json"] == {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 32,
    "clean_up_tokenization_spaces": False,
    "eos_token": "d",
  }
  assert read["config.json"]["torch_dtype"] == "float32"
  assert read["config.json"]["eos_token_id"] == 3
  assert read["config.json"]["bos_token_id"] is None


def test_several_ids_end_a_text_and_none_without_any(tmp_path):
  for name, stop, expected in (
    ("several", (3, 7), [3, 7]),
    ("none", (), None),
  ):
    (tmp_path / name).mkdir()
    _, path = _export(
      tmp_path / name, tiny.stored(tiny.DENSE, stop_tokens=stop)
    )
    for file in ("config.json", "generation_config.json"):
      assert json.loads((path / file).read_text())["eos_token_id"] == expected
    assert "tokenizer.json" not in tiny.contents(path)
  _, path = _export(
    tmp_path,
    tiny.stored(tiny.DENSE, tokenizer=tiny.tokenizer_json()),
    end_of_text="e",
  )
  assert json.loads((path / "config.json").read_text())["eos_token_id"] == 4


@pytest.mark.parametrize("max_bytes", [1, 400, 600, 1400])
def test_shards_hold_no_more_than_they_may(tmp_path, max_bytes):
  model = tiny.stored(tiny.KINDS["experts"][0])
  exported, path = _export(tmp_path, model, max_shard_bytes=max_bytes)
  files = sorted(path.glob("*.safetensors"))
  count = exported.num_shards
  assert [file.name for file in files] == [
    f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
  ]
  index = json.loads((path / "model.safetensors.index.json").read_text())
  assert index["metadata"] == {"total_size": exported.num_bytes}
  held: dict[str, Any] = {}
  total = 0
  previous = max_bytes
  for file in files:
    tensors = safetensors.numpy.load_file(file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= max_bytes or len(tensors) == 1
    # No file could have taken the first tensor of the next.
    assert previous + max(t.nbytes for t in tensors.values()) > max_bytes
    previous, total = size, total + size
    held |= dict.fromkeys(tensors, file.name)
  assert held == index["weight_map"]
  assert (total, len(held)) == (exported.num_bytes, exported.num_tensors)
  back = tiny.imported(path, tmp_path / "back")
  tiny.assert_same(back.params, model.params)


def test_tensors_come_in_the_order_of_the_layers(tmp_path):
  config = dataclasses.replace(tiny.DENSE, num_layers=11)
  _, path = _export(tmp_path, tiny.stored(config), max_shard_bytes=1)
  index = json.loads((path / "model.safetensors.index.json").read_text())
  order = sorted(index["weight_map"], key=index["weight_map"].__getitem__)
  numbers = [name.split(".")[2] for name in order if ".layers." in name]
  assert numbers == [str(i) for i in range(11) for _ in range(9)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_have_the_dtype_asked_for(tmp_path, dtype):
  model = tiny.stored(tiny.DENSE)
  exported, path = _export(tmp_path, model, dtype=dtype)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  assert {tensor.dtype for tensor in tensors.values()} == {jnp.dtype(dtype)}
  count = sum(math.prod(tensor.shape) for tensor in tensors.values())
  assert exported.num_bytes == count * jnp.dtype(dtype).itemsize
  assert json.loads((path / "config.json").read_text())["torch_dtype"] == dtype
  head = np.asarray(model.params["lm_head"]["kernel"])
  np.testing.assert_array_equal(
    tensors["lm_head.weight"], head.T.astype(jnp.dtype(dtype))
  )
  # float16 has values that bfloat16 has not, so it is read as float32.
  wide = "bfloat16" if dtype == "bfloat16" else "float32"
  back = tiny.imported(path, tmp_path / "back")
  assert back.config == dataclasses.replace(model.config, param_dtype=wide)


def test_values_beyond_the_range_are_refused_and_nothing_is_left(tmp_path):
  model = tiny.stored(tiny.DENSE)
  model.params["layers"]["mlp"]["up_kernel"] = (
    model.params["layers"]["mlp"]["up_kernel"].at[1, 2, 3:5].set(1e5)
  )
  with pytest.raises(UserError) as caught:
    _export(tmp_path, model, dtype="float16")
  assert str(caught.value) == (
    "dtype=float16: 2 of 48 elements of model.layers.1.mlp.up_proj.weight are"
    " beyond its range; expected float32"
  )
  assert tiny.contents(tmp_path) == ["model"]


def test_moments_and_average_are_left_out(tmp_path):
  tree = tiny.params(tiny.DENSE)
  model = tiny.stored(
    tiny.DENSE,
    moments=AdamMoments(count=jnp.asarray(3, jnp.int32), mu=tree, nu=tree),
    ema=tree,
  )
  _, path = _export(tmp_path, model)
  back = tiny.imported(path, tmp_path / "back")
  assert back.moments is None
  assert back.ema is None
  tiny.assert_same(back.params, model.params)


def test_a_damaged_model_is_named_and_nothing_is_left(tmp_path):
  source = tiny.save(tmp_path / "model", tiny.stored(tiny.DENSE))
  folder = source / "params" / "layers.mlp.up_kernel"
  chunk = next(file for file in folder.glob("c/**/*") if file.is_file())
  damaged = bytearray(chunk.read_bytes())
  damaged[1] ^= 4
  chunk.write_bytes(bytes(damaged))
  with pytest.raises(UserError) as caught:
    export_model(source, tmp_path / "out", progress=tiny.silent)
  assert str(caught.value).startswith(
    f"{source / 'params'}: leaf 'layers.mlp.up_kernel' is damaged: "
  )
  assert tiny.contents(tmp_path) == ["model"]


def test_what_no_class_computes_leaves_nothing(tmp_path):
  config = dataclasses.replace(tiny.DENSE, out_bias=True, sliding_window=7)
  with pytest.raises(UserError):
    _export(tmp_path, tiny.stored(config))
  assert tiny.contents(tmp_path) == ["model"]


def test_an_output_that_exists_is_left_alone(tmp_path):
  (tmp_path / "out").mkdir()
  with pytest.raises(UserError) as caught:
    _export(tmp_path, tiny.stored(tiny.DENSE))
  assert str(caught.value) == (
    f"{tmp_path / 'out'} exists; choose another output"
  )
  assert tiny.contents(tmp_path / "out") == []


def test_what_is_not_finite_is_exported_as_it_is(tmp_path):
  """Only an import refuses it: a diverged model may be looked at elsewhere."""
  model = tiny.stored(tiny.DENSE)
  scale = model.params["final_norm"]["scale"]
  model.params["final_norm"]["scale"] = scale.at[3].set(jnp.nan)
  _, path = _export(tmp_path, model, dtype="bfloat16")
  held = safetensors.numpy.load_file(path / "model.safetensors")
  found = held["model.norm.weight"].astype(np.float32)
  assert np.isnan(found).tolist() == [i == 3 for i in range(8)]
