"""Checkpoints and models of a few kilobytes, and what they compute."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models

from aquila_jax.core.axes import path_name
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
  MoeConfig,
)
from aquila_jax.core.model_dir import StoredModel, load_model, save_model
from aquila_jax.interop.import_model import import_model, open_checkpoint
from aquila_jax.models import decoder_lm

REFERENCES = pathlib.Path(__file__).parent / "references"
NAMES = sorted(file.parent.name for file in REFERENCES.glob("*/expected.npz"))

DENSE = ModelConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  mlp_dim=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  context_length=32,
  rope_theta=100.0,
  qkv_bias=False,
  compute_dtype="float32",
)
MOE = MoeConfig(num_experts=3, top_k=2, block_size=4)
SOFTMAX_FIRST: dict[str, Any] = dict(
  router_order="softmax_then_topk", renormalise=False
)


def _mixture(config: ModelConfig = DENSE, **fields: Any) -> ModelConfig:
  moe = dataclasses.replace(MOE, **fields)
  return dataclasses.replace(config, moe=moe)


def _dense(**fields: Any) -> ModelConfig:
  return dataclasses.replace(DENSE, **fields)


# Every kind that can be exported -> the class that it is exported to.
KINDS: dict[str, tuple[ModelConfig, str]] = {
  "dense": (DENSE, "LlamaForCausalLM"),
  "tied": (_dense(tied_embeddings=True), "LlamaForCausalLM"),
  "linear": (
    _dense(rope_scaling=LinearRopeScaling(factor=2.0)),
    "LlamaForCausalLM",
  ),
  "llama3": (
    _dense(
      rope_scaling=Llama3RopeScaling(factor=4.0, original_context_length=16)
    ),
    "LlamaForCausalLM",
  ),
  "all biases": (_dense(qkv_bias=True, out_bias=True), "LlamaForCausalLM"),
  "out bias": (_dense(out_bias=True), "LlamaForCausalLM"),
  "window": (_dense(sliding_window=5), "MistralForCausalLM"),
  "qkv bias": (_dense(qkv_bias=True), "Qwen2ForCausalLM"),
  "qkv bias, window": (
    _dense(qkv_bias=True, sliding_window=5),
    "Qwen2ForCausalLM",
  ),
  "qk_norm": (_dense(qk_norm=True), "Qwen3ForCausalLM"),
  "qk_norm, qkv bias, window, tied": (
    _dense(qk_norm=True, qkv_bias=True, sliding_window=5, tied_embeddings=True),
    "Qwen3ForCausalLM",
  ),
  "bfloat16": (
    _dense(param_dtype="bfloat16", compute_dtype="bfloat16"),
    "LlamaForCausalLM",
  ),
  "experts": (_mixture(), "MixtralForCausalLM"),
  "experts, window": (
    _mixture(_dense(sliding_window=5)),
    "MixtralForCausalLM",
  ),
  "experts, qkv bias": (
    _mixture(_dense(qkv_bias=True)),
    "Qwen2MoeForCausalLM",
  ),
  "experts, gates below one": (
    _mixture(**SOFTMAX_FIRST),
    "Qwen2MoeForCausalLM",
  ),
  "shared expert": (_mixture(shared_expert_dim=5), "Qwen2MoeForCausalLM"),
  "experts in some layers": (
    _mixture(_dense(num_layers=3), layers=(0, 2)),
    "Qwen2MoeForCausalLM",
  ),
  "experts in some layers, qk_norm": (
    _mixture(_dense(qk_norm=True), layers="every_second"),
    "Qwen3MoeForCausalLM",
  ),
  "experts in some layers, wider others": (
    _mixture(
      _dense(num_layers=3),
      layers=(0, 2),
      dense_mlp_dim=10,
      shared_expert_dim=4,
    ),
    "Qwen2MoeForCausalLM",
  ),
  "experts in some layers, wider others, qk_norm": (
    _mixture(_dense(qk_norm=True), layers="every_second", dense_mlp_dim=10),
    "Qwen3MoeForCausalLM",
  ),
  "experts, qk_norm": (
    _mixture(_dense(qk_norm=True), **SOFTMAX_FIRST),
    "Qwen3MoeForCausalLM",
  ),
  "experts, qk_norm, out bias": (
    _mixture(_dense(qk_norm=True, out_bias=True)),
    "Qwen3MoeForCausalLM",
  ),
}


def params(config: ModelConfig, *, seed: int = 0) -> Any:
  """Random everywhere: biases and scales are not special."""
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    is_scale = path_name(path).endswith("scale")
    drawn = 0.5 * generator.standard_normal(leaf.shape) + is_scale
    return jnp.asarray(drawn, leaf.dtype)

  return jax.tree_util.tree_map_with_path(
    draw, decoder_lm.abstract_params(config)
  )


LINEAGE = Lineage(
  events=(
    Event(kind="train", name="dense", steps=3, tokens=96, flops=1.5),
    Event(kind="scale_up", parent="dense", new_indices={"embed": [[4, 8]]}),
  )
)


def stored(config: ModelConfig, **fields: Any) -> StoredModel:
  defaults: dict[str, Any] = dict(
    config=config, lineage=LINEAGE, params=params(config), tokenizer=None
  )
  return StoredModel(**(defaults | fields))


def save(path: pathlib.Path, model: StoredModel) -> pathlib.Path:
  save_model(path, model, axes=decoder_lm.parameter_axes(model.config))
  return path


def load(path: pathlib.Path) -> StoredModel:
  return load_model(path, like=decoder_lm.abstract_params)


def silent(line: str) -> None:
  del line


def imported(
  source: pathlib.Path, output: pathlib.Path, **options: Any
) -> StoredModel:
  """The MODEL of a checkpoint, as it is read back from `output`."""
  checkpoint = open_checkpoint(source, **options)
  import_model(checkpoint, output, parent=str(source), progress=silent)
  return load(output)


@functools.cache
def _apply(config: ModelConfig):
  @jax.jit
  def apply(tree, ids):
    rows = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out: Any = decoder_lm.DecoderLM(config).apply(
      {"params": tree}, ids, positions=rows, segments=jnp.ones_like(ids)
    )
    return out.logits

  return apply


def logits(model: StoredModel, ids: Any) -> np.ndarray:
  """[B, T, V]."""
  return np.asarray(_apply(model.config)(model.params, jnp.asarray(ids)))


def assert_same(found: Any, expected: Any) -> None:
  """Bit for bit: trees of arrays, with their dtypes."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)

  def check(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

  jax.tree.map(check, found, expected)


def copy_of(
  name: str,
  to: pathlib.Path,
  *,
  config: Callable[[dict[str, Any]], Any] | None = None,
  tensors: Callable[[dict[str, np.ndarray]], Any] | None = None,
) -> pathlib.Path:
  """A copy of a reference with its config.json or its tensors changed."""
  shutil.copytree(REFERENCES / name, to)
  if config is not None:
    change_json(to / "config.json", config)
  if tensors is not None:
    file = to / "model.safetensors"
    held = safetensors.numpy.load_file(file)
    tensors(held)
    safetensors.numpy.save_file(held, file)
  return to


def change_json(file: pathlib.Path, change: Callable[[Any], Any]) -> None:
  tree = read_json(file)
  change(tree)
  file.write_text(json.dumps(tree))


def read_json(file: pathlib.Path) -> Any:
  return json.loads(file.read_text())


def contents(directory: pathlib.Path) -> list[str]:
  """Its entries, hidden and half-written ones among them."""
  return sorted(child.name for child in directory.iterdir())


def tokenizer_json() -> str:
  """A tokenizer.json of 11 words."""
  vocab = {word: i for i, word in enumerate("a b c d e f g h i j k".split())}
  return Tokenizer(models.WordLevel(vocab, unk_token="a")).to_str()
