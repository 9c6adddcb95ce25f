"""Stored checkpoints of transformers, and what is wrong with damaged ones."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import pathlib
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from aquila_jax.core.errors import UserError
from aquila_jax.core.lineage import Event
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import generate_tokens
from aquila_jax.interop import layout
from aquila_jax.interop.export_model import export_model
from aquila_jax.interop.families import FAMILIES
from aquila_jax.interop.hf_directory import Texts
from aquila_jax.interop.import_model import (
  Checkpoint,
  import_model,
  open_checkpoint,
)
from aquila_jax.interop.tensors import TensorInfo
from aquila_jax.models import decoder_lm
from tests.interop import tiny

# Products of rows of at most 24 (the FFN) in 2 layers of 7 matrices and a head,
# of numbers of a few units, in another order than transformers': 15 products of
# sqrt(24) roundings of 2^-24 are 4.4e-6, relative to logits of at most 7.
TOLERANCE = 15 * 24**0.5 * 2.0**-24 * 7


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """The MODEL of a reference, in float32; made once each."""
  folder = tmp_path_factory.mktemp("imported")

  @functools.cache
  def model(name: str) -> StoredModel:
    return tiny.imported(tiny.REFERENCES / name, folder / name, dtype="float32")

  return model


def _expected(name: str) -> dict[str, np.ndarray]:
  return dict(np.load(tiny.REFERENCES / name / "expected.npz"))


def test_every_family_has_a_reference():
  found = {
    json.loads((tiny.REFERENCES / name / "config.json").read_text())[
      "model_type"
    ]
    for name in tiny.NAMES
  }
  assert found == {
    *("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe"),
    "qwen3_moe",
  }


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_and_greedy_continuation_are_those_of_transformers(models, name):
  expected = _expected(name)
  found = tiny.logits(models(name), expected["ids"])
  assert np.abs(expected["logits"]).max() < 7
  np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=TOLERANCE)
  start = int(expected["prompt"]) - 1
  continued = found[0, start:-1].argmax(axis=-1)
  np.testing.assert_array_equal(continued, expected["ids"][0, start + 1 :])


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_moe"])
def test_generation_with_a_cache_continues_as_transformers_does(models, name):
  expected, model = _expected(name), models(name)
  start = int(expected["prompt"])
  row = expected["ids"][0].tolist()
  (found,) = generate_tokens(
    model.config,
    model.params,
    [row[:start]],
    sampling=Sampling(max_new_tokens=len(row) - start, temperature=0.0),
  )
  assert list(found.tokens) == row[start:]


def test_the_spelling_of_older_transformers_is_the_same_model(tmp_path):
  """rope_theta and rope_scaling in place of rope_parameters."""

  def older(tree):
    rope = tree.pop("rope_parameters")
    tree["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    key = "type" if kind == "linear" else "rope_type"
    tree["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    tree["torch_dtype"] = tree.pop("dtype")

  for name in ("llama", "llama_linear", "llama_llama3", "qwen3_moe"):
    path = tiny.copy_of(name, tmp_path / name, config=older)
    found = open_checkpoint(path)
    assert found.config == open_checkpoint(tiny.REFERENCES / name).config
    assert found.unknown == []


def test_lineage_and_dtype_of_a_checkpoint(tmp_path):
  source = tiny.REFERENCES / "qwen3"
  checkpoint = open_checkpoint(source)
  assert checkpoint.unknown == []
  # 2 layers of 4 matrices of attention, 3 of the FFN and 4 norms; a last norm,
  # embedding and head.
  assert (checkpoint.family, len(checkpoint.source.tensors)) == ("qwen3", 25)
  assert checkpoint.config.param_dtype == "bfloat16"
  lines: list[str] = []
  written = import_model(
    checkpoint, tmp_path / "a", parent="somewhere", progress=lines.append
  )
  assert lines == []  # one for every 100 tensors
  model = tiny.load(tmp_path / "a")
  assert model.lineage.events == (
    Event(kind="import", parent="somewhere", options={"family": "qwen3"}),
  )
  assert written.params == decoder_lm.abstract_params(model.config)
  assert dataclasses.replace(written, params=None) == dataclasses.replace(
    model, params=None
  )
  wide = tiny.imported(source, tmp_path / "b", dtype="float32")
  assert wide.config == dataclasses.replace(
    model.config, param_dtype="float32", compute_dtype="float32"
  )
  # bfloat16 is a part of float32.
  tiny.assert_same(
    wide.params, jax.tree.map(lambda x: x.astype(jnp.float32), model.params)
  )
  half = jax.tree.leaves(model.params)
  assert {leaf.dtype for leaf in half} == {jnp.dtype("bfloat16")}


class _Counted:
  """Random tensors of a model, that knows which of them are still held."""

  def __init__(self, config: ModelConfig):
    self.tensors = {
      slot.tensor: TensorInfo(shape=slot.shape, dtype="F32", file="memory")
      for slot in layout.slots(config, FAMILIES["llama"].tensors)
    }
    self.held = 0
    self.most = 0

  def refusal(self, info: TensorInfo) -> str | None:
    del info

  def read(self, name: str) -> np.ndarray:
    value = np.full(self.tensors[name].shape, 0.5, np.float32)
    self.held += 1
    self.most = max(self.most, self.held)
    weakref.finalize(value, self._let_go)
    return value

  def _let_go(self) -> None:
    self.held -= 1


def test_one_tensor_at_a_time_is_held(tmp_path):
  config = dataclasses.replace(
    tiny.DENSE, num_layers=22, param_dtype="bfloat16"
  )
  source = _Counted(config)
  checkpoint = Checkpoint(
    source=source,
    config=config,
    names=FAMILIES["llama"].tensors,
    texts=Texts(
      tokenizer=None, stop_tokens=(), begin_token=None, chat_template=None
    ),
    idle={},
    repeats={},
    derived=frozenset(),
    lineage=tiny.LINEAGE,
    family="llama",
    unknown=[],
  )
  lines: list[str] = []
  gc.disable()  # what is let go must not wait for the collector
  try:
    import_model(checkpoint, tmp_path / "a", parent="", progress=lines.append)
  finally:
    gc.enable()
  assert (source.most, source.held) == (1, 0)
  # 22 layers of 9, embedding, norm and head.
  assert lines == ["100 of 201 tensors", "200 of 201 tensors"]


def _refused(checkpoint: Checkpoint, tmp_path: pathlib.Path) -> str:
  """The message; nothing is left where the output would be."""
  before = tiny.contents(tmp_path)
  with pytest.raises(UserError) as caught:
    import_model(
      checkpoint, tmp_path / "new", parent="it", progress=tiny.silent
    )
  assert tiny.contents(tmp_path) == before
  return str(caught.value)


_LAYER = "model.layers.{}.".format


def test_one_error_lists_everything_that_is_wrong_with_the_tensors(tmp_path):
  def damage(held):
    del held["model.norm.weight"], held[_LAYER(1) + "mlp.up_proj.weight"]
    held["model.vision.weight"] = np.ones(3, np.float32)
    held["lm_head.weight"] = held["lm_head.weight"][:5]
    table = "model.embed_tokens.weight"
    held[table] = held[table].astype(np.int8)
    query = held[_LAYER(0) + "self_attn.q_proj.weight"].astype(np.float32)
    query[0, 0], query[1, 1] = np.nan, -np.inf
    held[_LAYER(0) + "self_attn.q_proj.weight"] = query

  path = tiny.copy_of("llama", tmp_path / "a", tensors=damage)
  assert _refused(open_checkpoint(path), tmp_path) == "\n".join(
    [
      "it: 6 problems",
      "  model.norm.weight: is missing; expected shape [16]",
      "  model.layers.1.mlp.up_proj.weight: is missing; expected shape"
      " [24, 16]",
      "  lm_head.weight: has shape [5, 16]; expected [61, 16]",
      "  model.embed_tokens.weight: has type I8; expected one of F64, F32,"
      " BF16, F16",
      "  model.vision.weight: is unexpected; in model.safetensors",
      "  model.layers.0.self_attn.q_proj.weight: 2 of 256 elements are not"
      " finite",
    ]
  )


def test_what_is_not_finite_is_found_while_writing_too(tmp_path):
  def damage(held):
    for name in ("model.norm.weight", "lm_head.weight"):
      held[name] = held[name].astype(np.float32)
      held[name].flat[3] = np.inf

  path = tiny.copy_of("llama", tmp_path / "a", tensors=damage)
  assert _refused(open_checkpoint(path), tmp_path) == (
    "it: 2 problems\n"
    "  model.norm.weight: 1 of 16 elements are not finite\n"
    "  lm_head.weight: 1 of 976 elements are not finite"
  )


@pytest.mark.parametrize(
  ("kind", "value", "dtype"),
  [(np.float32, 3.4e38, "bfloat16"), (np.float64, 1e300, "float32")],
)
def test_what_the_dtype_cannot_hold_is_refused(tmp_path, kind, value, dtype):
  def enlarge(held):
    held["model.norm.weight"] = held["model.norm.weight"].astype(kind)
    held["model.norm.weight"][2:4] = value

  path = tiny.copy_of("llama", tmp_path / "a", tensors=enlarge)
  assert _refused(open_checkpoint(path, dtype=dtype), tmp_path) == (
    "it: model.norm.weight: 2 of 16 elements are beyond the range of " + dtype
  )


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    (np.float64, "float32"),
    (np.float32, "float32"),
    (np.float16, "float32"),
    (jnp.bfloat16, "bfloat16"),
  ],
)
def test_tensors_of_every_float_are_read(tmp_path, kind, dtype):
  held_in_half: dict[str, np.ndarray] = {}

  def cast(held):
    for name, value in held.items():
      # Exact in each of the types, but for what float16 rounds to zero.
      held[name] = value.astype(np.float16).astype(jnp.bfloat16).astype(kind)
    held_in_half.update(held)

  path = tiny.copy_of("llama", tmp_path / "a", tensors=cast)
  model = tiny.imported(path, tmp_path / "b")
  assert (model.config.param_dtype, model.config.compute_dtype) == (
    dtype,
    dtype,
  )
  head = model.params["lm_head"]["kernel"]
  assert head.dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(
    np.asarray(head, np.float64),
    held_in_half["lm_head.weight"].T.astype(np.float64),
  )


def _tie(tree: dict[str, Any]) -> None:
  tree["tie_word_embeddings"] = True


def test_a_tied_head_that_repeats_the_table_is_no_other_model(tmp_path):
  def repeat(held):
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()

  def drop(held):
    del held["lm_head.weight"]

  found = [
    tiny.imported(
      tiny.copy_of("llama", tmp_path / name, config=_tie, tensors=change),
      tmp_path / f"{name} imported",
    )
    for name, change in (("repeated", repeat), ("dropped", drop))
  ]
  assert found[0].config.tied_embeddings
  assert "lm_head" not in found[0].params
  tiny.assert_same(found[0].params, found[1].params)


def test_a_tied_head_that_differs_is_refused(tmp_path):
  path = tiny.copy_of("llama", tmp_path / "a", config=_tie)
  assert _refused(open_checkpoint(path), tmp_path) == (
    "it: lm_head.weight: differs from model.embed_tokens.weight, though"
    " tie_word_embeddings is true"
  )

  def drop(held):
    del held["model.norm.weight"]

  # With what is missing, in one error.
  path = tiny.copy_of("llama", tmp_path / "b", config=_tie, tensors=drop)
  assert _refused(open_checkpoint(path), tmp_path) == (
    "it: 2 problems\n"
    "  model.norm.weight: is missing; expected shape [16]\n"
    "  lm_head.weight: differs from model.embed_tokens.weight, though"
    " tie_word_embeddings is true"
  )


def test_buffers_of_rope_are_known_and_widen_nothing(tmp_path):
  def add(held):
    for layer in range(2):
      name = _LAYER(layer) + "self_attn.rotary_emb.inv_freq"
      held[name] = np.ones(2, np.float32)

  path = tiny.copy_of("llama", tmp_path / "a", tensors=add)
  model = tiny.imported(path, tmp_path / "b")
  plain = tiny.imported(tiny.REFERENCES / "llama", tmp_path / "c")
  assert model.config == plain.config
  tiny.assert_same(model.params, plain.params)


def test_vectors_may_be_kept_as_rows(tmp_path):
  def fold(held):
    held["model.norm.weight"] = held["model.norm.weight"][None]

  path = tiny.copy_of("llama", tmp_path / "a", tensors=fold)
  model = tiny.imported(path, tmp_path / "b")
  plain = tiny.imported(tiny.REFERENCES / "llama", tmp_path / "c")
  tiny.assert_same(model.params, plain.params)


def test_zeros_that_are_none_are_refused_with_the_rest(tmp_path):
  """Of an export; see export_model_test.py."""
  config, _ = tiny.KINDS["out bias"]
  model = tiny.save(tmp_path / "model", tiny.stored(config))
  export_model(model, tmp_path / "out", progress=tiny.silent)
  file = tmp_path / "out" / "model.safetensors"
  held = safetensors.numpy.load_file(file)
  held[_LAYER(1) + "self_attn.k_proj.bias"][3] = 1e-30
  safetensors.numpy.save_file(held, file)
  assert _refused(open_checkpoint(tmp_path / "out"), tmp_path) == (
    "it: model.layers.1.self_attn.k_proj.bias: expected zeros, by"
    " aquila_jax.json"
  )
  del held[_LAYER(1) + "self_attn.k_proj.bias"], held["model.norm.weight"]
  safetensors.numpy.save_file(held, file)
  assert _refused(open_checkpoint(tmp_path / "out"), tmp_path) == (
    "it: 2 problems\n"
    "  model.norm.weight: is missing; expected shape [8]\n"
    "  model.layers.1.self_attn.k_proj.bias: is missing; expected shape [8]"
  )


def test_an_output_that_exists_is_left_alone(tmp_path):
  (tmp_path / "new").mkdir()
  checkpoint = open_checkpoint(tiny.REFERENCES / "llama")
  assert _refused(checkpoint, tmp_path) == (
    f"{tmp_path / 'new'} exists; choose another output"
  )


def test_an_interruption_leaves_nothing(tmp_path):
  checkpoint = open_checkpoint(tiny.REFERENCES / "llama")
  read = checkpoint.source.read

  def interrupted(name: str) -> np.ndarray:
    if "layers.1" in name:
      raise KeyboardInterrupt
    return read(name)

  checkpoint.source.read = interrupted  # pyright: ignore[reportAttributeAccessIssue]
  with pytest.raises(KeyboardInterrupt):
    import_model(checkpoint, tmp_path / "a", parent="", progress=tiny.silent)
  assert tiny.contents(tmp_path) == []


def test_the_given_tokenizer_comes_before_the_checkpoints(tmp_path):
  path = tiny.copy_of("llama", tmp_path / "a")
  (path / "tokenizer.json").write_text("{}")  # it is not read
  checkpoint = open_checkpoint(path, with_tokenizer=False)
  import_model(
    checkpoint,
    tmp_path / "b",
    parent="",
    tokenizer=tiny.tokenizer_json(),
    progress=tiny.silent,
  )
  assert tiny.load(tmp_path / "b").tokenizer == tiny.tokenizer_json()


def test_a_path_to_nothing_is_refused(tmp_path):
  missing = tmp_path / "missing"
  with pytest.raises(UserError) as caught:
    open_checkpoint(missing, what="--source")
  assert str(caught.value) == (
    f"--source={str(missing)!r}: there is no such file"
  )
