"""GGUF files: the same model as the directory they were written from."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.errors import UserError
from aquila_jax.core.model_config import Llama3RopeScaling
from aquila_jax.interop.gguf_file import GGUFFile
from aquila_jax.interop.import_model import import_model, open_checkpoint
from tests.interop import gguf_kit, tiny
from tests.interop.gguf_kit import Type

# One of each architecture and option; in llama3's only the metadata differ.
KINDS = [
  *("llama", "llama_bias", "llama_linear", "mistral", "mistral_window"),
  *("qwen2", "qwen3", "qwen3_bias", "mixtral", "qwen2_moe", "qwen3_moe"),
]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_the_model_that_the_directory_is(tmp_path, name):
  file = gguf_kit.write_reference(tmp_path / "a.gguf", name)
  found = tiny.imported(file, tmp_path / "found")
  expected = tiny.imported(
    tiny.REFERENCES / name, tmp_path / "expected", dtype="float32"
  )
  tiny.assert_same(found.params, expected.params)
  # GGUF does not keep what weights were drawn from.
  assert found.config == dataclasses.replace(expected.config, init_std=0.02)
  assert open_checkpoint(file).unknown == []


def test_logits_are_those_of_transformers(tmp_path):
  """As a check of the test above: of interleaved halves, in both."""
  file = gguf_kit.write_reference(tmp_path / "a.gguf", "llama_bias")
  model = tiny.imported(file, tmp_path / "found")
  expected = np.load(tiny.REFERENCES / "llama_bias" / "expected.npz")
  found = tiny.logits(model, expected["ids"])
  # As in import_model_test.py.
  np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=3.2e-5)


def _scaled(value: np.ndarray, kind: Type) -> np.ndarray:
  """What a block of 32 numbers becomes, by the formats' definitions."""
  blocks = value.reshape(-1, 32).astype(np.float64)
  out = np.empty_like(blocks)
  for row, block in enumerate(blocks):
    largest = block[np.argmax(np.abs(block))]
    if kind == Type.Q8_0:
      step = np.abs(largest) / 127
      scale, low = step, 0.0
      numbers = np.round(block / step) if step else block
    elif kind == Type.Q4_0:
      scale, low = largest / -8, 0.0
      numbers = np.clip(np.floor(block / scale + 8.5), 0, 15) - 8
    else:  # Q4_1
      low = block.min()
      scale = (block.max() - low) / 15
      numbers = np.clip(np.floor((block - low) / scale + 0.5), 0, 15)
    out[row] = numbers * float(np.float16(scale)) + float(np.float16(low))
  return out.reshape(value.shape)


def _wide() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A Qwen2 whose rows are whole blocks of 32."""
  metadata = gguf_kit.metadata_of("qwen2") | {
    "qwen2.embedding_length": 32,
    "qwen2.feed_forward_length": 64,
  }
  rng = np.random.default_rng(0)
  sizes = {16: 32, 24: 64, 8: 16, 61: 61}
  tensors = {
    name: rng.normal(size=[sizes[n] for n in value.shape])
    for name, value in gguf_kit.tensors_of("qwen2").items()
  }
  return metadata, {n: v.astype(np.float32) for n, v in tensors.items()}


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_quantized_tensors_are_what_their_format_says(tmp_path, kind):
  metadata, tensors = _wide()
  file = gguf_kit.write(tmp_path / "a.gguf", metadata, tensors, types=kind)
  model = tiny.imported(file, tmp_path / "found")
  assert model.config.param_dtype == "float32"
  for name, leaf in (
    ("token_embd.weight", model.params["embedding"]["table"]),
    ("output.weight", model.params["lm_head"]["kernel"].T),
    (
      "blk.1.ffn_down.weight",
      model.params["layers"]["mlp"]["down_kernel"][1].T,
    ),
  ):
    expected = _scaled(tensors[name], kind)
    # A number that lies between two steps may be rounded to either.
    step = np.abs(expected - tensors[name]).max() * 2
    wrong = np.abs(np.asarray(leaf) - expected) > 1e-6
    assert wrong.mean() < 0.01
    assert np.abs(np.asarray(leaf) - expected).max() <= step
  # Vectors are kept whole.
  np.testing.assert_array_equal(
    model.params["final_norm"]["scale"], tensors["output_norm.weight"]
  )


@pytest.mark.parametrize(
  ("kind", "dtype", "exact"),
  [
    (Type.F64, "float32", True),
    (Type.F16, "float32", False),
    (Type.BF16, "bfloat16", True),
  ],
)
def test_floats_of_every_width_are_read(tmp_path, kind, dtype, exact):
  file = gguf_kit.write_reference(tmp_path / "a.gguf", "llama", types=kind)
  model = tiny.imported(file, tmp_path / "found")
  assert (model.config.param_dtype, model.config.compute_dtype) == (
    dtype,
    dtype,
  )
  table = gguf_kit.tensors_of("llama")["token_embd.weight"]
  if not exact:  # what float16 has no number for
    table = table.astype(np.float16)
  found = model.params["embedding"]["table"]
  assert found.dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(np.asarray(found, np.float32), table)


def test_one_matrix_that_is_wider_widens_all(tmp_path):
  tensors = gguf_kit.tensors_of("llama")
  types = dict.fromkeys(tensors, Type.BF16) | {"output.weight": Type.F16}
  file = gguf_kit.write(
    tmp_path / "a.gguf", gguf_kit.metadata_of("llama"), tensors, types=types
  )
  assert open_checkpoint(file).config.param_dtype == "float32"
  assert open_checkpoint(file, dtype="bfloat16").config.param_dtype == (
    "bfloat16"
  )


def _llama3_divisors(*, head_dim: int, theta: float, factor: float):
  """As llama.cpp's converter writes them: one frequency at a time."""
  divisors = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * math.pi * theta ** (i / head_dim)
    if wavelength < 8192 / 4:
      divisors.append(1.0)
    elif wavelength > 8192 / 1:
      divisors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  return np.asarray(divisors, np.float32)


def test_divisors_of_llama3_are_its_scaling(tmp_path):
  # Heads of 16 and a base of 500,000: four frequencies are kept, one lies
  # between, three are divided.
  divisors = _llama3_divisors(head_dim=16, theta=5e5, factor=32.0)
  assert (divisors == 1).sum() == 4
  assert (divisors == 32).sum() == 3
  rng = np.random.default_rng(0)
  tensors = gguf_kit.tensors_of("llama")
  for layer in range(2):
    for name, shape in dict(q=(64, 16), k=(32, 16), v=(32, 16)).items():
      tensors[f"blk.{layer}.attn_{name}.weight"] = rng.normal(
        size=shape
      ).astype(np.float32)
    tensors[f"blk.{layer}.attn_output.weight"] = rng.normal(
      size=(16, 64)
    ).astype(np.float32)
  tensors["rope_freqs.weight"] = divisors
  metadata = gguf_kit.metadata_of("llama") | {
    "llama.rope.freq_base": 5e5,
    "llama.rope.dimension_count": 16,
    "llama.attention.key_length": 16,
    "llama.attention.value_length": 16,
  }
  file = gguf_kit.write(tmp_path / "a.gguf", metadata, tensors)
  model = tiny.imported(file, tmp_path / "found")
  assert model.config.rope_scaling == Llama3RopeScaling(
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context_length=8192,
  )
  for wrong in (divisors * 1.01, divisors[:-1], np.full_like(divisors, np.nan)):
    tensors["rope_freqs.weight"] = wrong
    file = gguf_kit.write(tmp_path / "b.gguf", metadata, tensors)
    assert _refusal(file) == (
      "rope_freqs.weight: its divisors are not those of Llama 3"
    )


def _refusal(file: pathlib.Path, **options: Any) -> str:
  """The message, without the path in front of it."""
  with pytest.raises(UserError) as caught:
    open_checkpoint(file, what="--source", **options)
  prefix = f"--source={str(file)!r}: "
  assert str(caught.value).startswith(prefix)
  return str(caught.value).removeprefix(prefix)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
  "a missing size": (
    "llama",
    dict(llama__embedding_length=None),
    "embedding_length is missing",
  ),
  "several": (
    "llama",
    dict(
      llama__block_count=None,
      llama__context_length="64",
      llama__attention__value_length=6,
    ),
    "3 problems\n"
    "  attention.value_length=6: expected 4; a head has one width, rotated"
    " whole\n"
    "  context_length='64': expected int\n"
    "  block_count is missing",
  ),
  "heads that differ by layer": (
    "llama",
    dict(llama__attention__head_count_kv=[2, 1]),
    "attention.head_count_kv=[2, 1]: expected int",
  ),
  "half of a head": (
    "llama",
    dict(llama__rope__dimension_count=2),
    "rope.dimension_count=2: expected 4; a head has one width, rotated whole",
  ),
  "another vocabulary": (
    "llama",
    dict(llama__vocab_size=60),
    "vocab_size=60: expected 61; the table has those rows",
  ),
  "yarn": (
    "qwen2",
    dict(qwen2__rope__scaling__type="yarn"),
    "rope.scaling.type='yarn': expected none or linear; no other scaling of"
    " RoPE is there",
  ),
  "linear by nothing": (
    "llama",
    dict(llama__rope__scaling__type="linear", llama__rope__scaling__factor=0.0),
    "factor=0.0: need > 0",
  ),
  "gates of a sigmoid": (
    "qwen3_moe",
    dict(qwen3moe__expert_gating_func=2),
    "expert_gating_func=2: expected 1; gates are a softmax here",
  ),
  "dense layers": (
    "qwen2_moe",
    dict(qwen2moe__leading_dense_block_count=1),
    "leading_dense_block_count=1: expected 0; all layers have experts",
  ),
  "more experts a token than there are": (
    "mixtral",
    dict(llama__expert_used_count=9),
    "top_k=9: need 1 <= top_k <= num_experts=4",
  ),
  "no number of experts a token": (
    "mixtral",
    dict(llama__expert_used_count=None),
    "expert_used_count is missing",
  ),
  "a part of a split file": (
    "llama",
    dict(split__count=3),
    "split.count=3: expected a whole file; join its parts with"
    " llama-gguf-split --merge",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused(tmp_path, name):
  reference, changes, message = REFUSED[name]
  file = gguf_kit.write_reference(tmp_path / "a.gguf", reference, **changes)
  assert _refusal(file) == message


def test_another_architecture_is_refused_after_a_split(tmp_path):
  metadata = {"general.architecture": "gpt2"}
  file = gguf_kit.write(tmp_path / "a.gguf", metadata, {"a": np.ones((2, 2))})
  assert _refusal(file) == (
    "general.architecture='gpt2' cannot be imported; expected one of llama,"
    " qwen2, qwen3, qwen2moe, qwen3moe"
  )
  # Only the first part of a split file says of what architecture it is.
  metadata["split.count"] = 2  # pyright: ignore[reportArgumentType]
  file = gguf_kit.write(tmp_path / "b.gguf", metadata, {"a": np.ones((2, 2))})
  assert _refusal(file).startswith("split.count=2: expected a whole file")


def test_keys_that_are_not_known_are_returned(tmp_path):
  file = gguf_kit.write_reference(
    tmp_path / "a.gguf", "llama", llama__new__feature=3, general__name="tiny"
  )
  assert open_checkpoint(file).unknown == ["new.feature"]


@pytest.mark.parametrize("part", [0, 3, 20, 400, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(tmp_path, part):
  file = gguf_kit.write_reference(tmp_path / "a.gguf", "llama")
  whole = file.read_bytes()
  # Positions in the header, parts of the whole, or from its end.
  end = int(part * len(whole)) if isinstance(part, float) else part
  file.write_bytes(whole[:end])
  assert _refusal(file).startswith(
    ("is truncated, damaged or no GGUF file: ", "is truncated: ")
  )


@pytest.mark.parametrize("text", [b"", b"GGUF", b"no such file" * 100])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
  file = tmp_path / "a.gguf"
  file.write_bytes(text)
  assert _refusal(file).startswith("is truncated, damaged or no GGUF file: ")


def test_tensors_are_accounted_for(tmp_path):
  tensors = gguf_kit.tensors_of("qwen2")
  del tensors["blk.1.ffn_up.weight"]
  tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:8]
  tensors["blk.0.extra.weight"] = np.ones((2, 3), np.float32)
  tensors["output_norm.weight"][2] = np.nan
  file = gguf_kit.write(
    tmp_path / "a.gguf", gguf_kit.metadata_of("qwen2"), tensors
  )
  with pytest.raises(UserError) as caught:
    import_model(
      open_checkpoint(file), tmp_path / "b", parent="it", progress=tiny.silent
    )
  assert str(caught.value) == (
    "it: 4 problems\n"
    "  blk.0.attn_q.weight: has shape [8, 16]; expected [16, 16]\n"
    "  blk.1.ffn_up.weight: is missing; expected shape [24, 16]\n"
    "  blk.0.extra.weight: is unexpected; in a.gguf\n"
    "  output_norm.weight: 1 of 16 elements are not finite"
  )
  assert tiny.contents(tmp_path) == ["a.gguf"]
  del tensors["token_embd.weight"]
  file = gguf_kit.write(
    tmp_path / "c.gguf", gguf_kit.metadata_of("qwen2"), tensors
  )
  assert _refusal(file) == "token_embd.weight is missing"


def test_texts_of_a_file(tmp_path):
  words = "<s> </s> a b ab".split()
  tokenizer = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": words,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 1,
    "tokenizer.ggml.eom_token_id": 3,
    "tokenizer.chat_template": "{{ a }}",
  }
  tensors = gguf_kit.tensors_of("llama")
  metadata = gguf_kit.metadata_of("llama") | tokenizer
  file = gguf_kit.write(tmp_path / "a.gguf", metadata, tensors)
  texts = GGUFFile(file, what="--source").texts()
  assert texts.stop_tokens == (1, 3)
  assert texts.chat_template == "{{ a }}"
  assert texts.tokenizer is not None
  # A kind that is not known needs another tokenizer, and takes it.
  metadata["tokenizer.ggml.pre"] = "new"
  file = gguf_kit.write(tmp_path / "b.gguf", metadata, tensors)
  assert _refusal(file) == (
    "tokenizer.ggml.pre='new' is not known; expected one of gpt-2, smollm,"
    " llama-bpe, qwen2, or give --tokenizer=tokenizer.json"
  )
  checkpoint = open_checkpoint(file, with_tokenizer=False)
  assert checkpoint.texts.tokenizer is None
  assert checkpoint.texts.stop_tokens == (1, 3)
