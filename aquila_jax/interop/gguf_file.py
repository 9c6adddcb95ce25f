"""A GGUF file (llama.cpp): metadata, quantized tensors, tokenizer.

Read and dequantised by the `gguf` package. Facts of the format that it leaves
to the reader, from llama.cpp's converter and graphs:

- Architecture `llama` (Llama, Mistral, Mixtral, SmolLM) rotates neighbouring
  pairs, so its Q and K are stored with each head's halves interleaved; Qwen's
  are stored as they are.
- The experts of a layer are one tensor [E, out, in].
- Llama 3's RoPE scaling is kept as the tensor rope_freqs.weight, the divisors
  of the frequencies, and not in the metadata.
- Whether the chosen gates are divided by their sum is fixed by architecture.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from aquila_jax.core import errors
from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
  MoeConfig,
  RopeScaling,
)
from aquila_jax.interop import gguf_tokenizer, names
from aquila_jax.interop.fields import Fields
from aquila_jax.interop.hf_directory import Texts
from aquila_jax.interop.tensors import TensorInfo
from aquila_jax.layers import rotary

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
_ROPE_DIVISORS = "rope_freqs.weight"
# Sections of the metadata that describe no computation.
_IGNORED_SECTIONS = ("general.", "tokenizer.", "GGUF.", "split.", "quantize.")
_LLAMA3_CONTEXT = 8192  # before extension, of every Llama 3


class GGUFFile:
  """Reads a .gguf file.

  Args:
    path: the file.
    what: the flag that named it, for messages.

  Raises:
    errors.UserError: where it is no whole GGUF file, or of an architecture
      that cannot be represented.
  """

  def __init__(self, path: pathlib.Path, *, what: str):
    self._what = f"{what}={str(path)!r}"
    try:
      reader = gguf.GGUFReader(path)
      self._metadata = {
        name: field.contents() for name, field in reader.fields.items()
      }
    # The package indexes into the file before it knows that it is whole.
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
      raise errors.UserError(
        f"{self._what}: is truncated, damaged or no GGUF file:"
        f" {type(error).__name__}: {error}"
      ) from error
    size = path.stat().st_size
    for tensor in reader.tensors:
      if int(tensor.data_offset) + int(tensor.n_bytes) > size:
        raise errors.UserError(
          f"{self._what}: is truncated: {tensor.name} ends at byte"
          f" {int(tensor.data_offset) + int(tensor.n_bytes)} of {size}"
        )
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    # Of a split file only the first part says more.
    if self._metadata.get("split.count", 0) > 1:
      raise errors.UserError(
        f"{self._what}: split.count={self._metadata['split.count']}: expected a"
        " whole file; join its parts with llama-gguf-split --merge"
      )
    architecture = self._metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
      raise errors.UserError(
        f"{self._what}: general.architecture={architecture!r} cannot be"
        f" imported; expected one of {', '.join(ARCHITECTURES)}"
      )
    self.architecture: str = architecture
    self.tensors = {
      name: TensorInfo(
        # GGUF counts dimensions from the fastest.
        shape=tuple(int(n) for n in reversed(tensor.shape)),
        dtype=tensor.tensor_type.name,
        file=path.name,
      )
      for name, tensor in self._tensors.items()
    }
    self.unknown: list[str] = []

  def refusal(self, info: TensorInfo) -> str | None:
    kind = gguf.GGMLQuantizationType[info.dtype]
    plain = (
      gguf.GGMLQuantizationType.F64,
      gguf.GGMLQuantizationType.F32,
      gguf.GGMLQuantizationType.F16,
    )
    if kind in plain or kind in gguf.quants._type_traits:
      return None
    return f"type {info.dtype}, which the gguf package does not dequantise"

  def read(self, name: str) -> np.ndarray:
    tensor, info = self._tensors[name], self.tensors[name]
    if info.dtype == "F64":
      value = np.asarray(tensor.data)
    else:
      value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    value = value.reshape(info.shape)
    if self.architecture == "llama":
      value = self._halves_apart(name, value)
    return value.astype(jnp.bfloat16) if info.dtype == "BF16" else value

  def _halves_apart(self, name: str, value: np.ndarray) -> np.ndarray:
    """Undoes the interleaving of the halves of Q's and K's heads."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    if part not in ("attn_q", "attn_k"):
      return value
    key = "head_count_kv" if part == "attn_k" else "head_count"
    heads = self._metadata.get(f"llama.attention.{key}")
    if heads is None:
      heads = self._metadata["llama.attention.head_count"]
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)

  @property
  def dtype(self) -> str:
    """The dtype that holds every tensor exactly; what is quantized is float32.

    Vectors are kept in float32 whatever the matrices are, and do not count.
    float64 is rounded, as in HFDirectory.
    """
    found = {i.dtype for i in self.tensors.values() if len(i.shape) > 1}
    return "bfloat16" if found == {"BF16"} else "float32"

  @property
  def names(self) -> Mapping[str, str]:
    return names.GGUF_MOE if self._num_experts else names.GGUF_DENSE

  @property
  def derived(self) -> frozenset[str]:
    """Tensors that `model_config` has read."""
    return frozenset({_ROPE_DIVISORS} & set(self._tensors))

  @property
  def _num_experts(self) -> int:
    return self._metadata.get(f"{self.architecture}.expert_count") or 0

  def model_config(self, dtype: str) -> ModelConfig:
    """The architecture, in parameters of `dtype`.

    Raises:
      errors.UserError: naming everything that cannot be represented.
    """
    prefix = f"{self.architecture}."
    fields = Fields(
      {
        name.removeprefix(prefix): value
        for name, value in self._metadata.items()
        if not name.startswith(_IGNORED_SECTIONS)
      },
      what=self._what,
    )
    heads = fields.take("attention.head_count", int)
    width = fields.take("embedding_length", int)
    head_dim = fields.take("attention.key_length", int, width // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
      fields.expect(name, head_dim, why="a head has one width, rotated whole")
    fields.expect("attention.causal", True, why="a decoder is causal")
    theta = fields.take("rope.freq_base", float, 1e4)
    context = fields.take("context_length", int)
    window = fields.take("attention.sliding_window", int, 0)
    table = self.tensors.get("token_embd.weight")
    if table is None:
      raise errors.UserError(f"{self._what}: token_embd.weight is missing")
    fields.expect("vocab_size", table.shape[0], why="the table has those rows")
    values: dict[str, Any] = dict(
      vocab_size=table.shape[0],
      num_layers=fields.take("block_count", int),
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=fields.take("attention.head_count_kv", int, heads),
      head_dim=head_dim,
      context_length=context,
      rope_theta=_shortest(theta),
      rope_scaling=self._rope_scaling(fields, head_dim=head_dim, theta=theta),
      sliding_window=window if 0 < window < context else None,
      norm_epsilon=_shortest(
        fields.take("attention.layer_norm_rms_epsilon", float)
      ),
      qkv_bias="blk.0.attn_q.bias" in self._tensors,
      out_bias="blk.0.attn_output.bias" in self._tensors,
      qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
      tied_embeddings="output.weight" not in self._tensors,
      param_dtype=dtype,
      compute_dtype=dtype,
    )
    values |= self._ffn(fields)
    fields.check()
    self.unknown = fields.unknown
    try:
      return ModelConfig(**values)
    except ValueError as error:
      raise errors.UserError(f"{self._what}: {error}") from error

  def _rope_scaling(
    self, fields: Fields, *, head_dim: int, theta: float
  ) -> RopeScaling | None:
    kind = fields.take("rope.scaling.type", str, "none")
    scaling: RopeScaling | None = None
    if kind == "linear":
      before = len(fields.problems)
      factor = _shortest(fields.take("rope.scaling.factor", float))
      scaling = fields.make(
        lambda: LinearRopeScaling(factor=factor), since=before
      )
    elif kind != "none":
      fields.refuse(
        f"rope.scaling.type={kind!r}: expected none or linear; no other scaling"
        " of RoPE is there"
      )
    if _ROPE_DIVISORS not in self._tensors:
      return scaling
    divisors = self.read(_ROPE_DIVISORS).astype(np.float64)
    if divisors.shape == (head_dim // 2,) and np.all(divisors > 0):
      llama3 = Llama3RopeScaling(
        factor=_shortest(float(divisors.max())),
        original_context_length=_LLAMA3_CONTEXT,
      )
      expected = rotary.frequency_divisors(
        llama3, head_dim=head_dim, theta=theta
      )
      if scaling is None and np.allclose(divisors, expected, rtol=1e-5):
        return llama3
    fields.refuse(f"{_ROPE_DIVISORS}: its divisors are not those of Llama 3")
    return None

  def _ffn(self, fields: Fields) -> dict[str, Any]:
    before = len(fields.problems)
    hidden = fields.take("feed_forward_length", int, 0)
    if not self._num_experts:
      fields.ignore("expert_count", "expert_used_count")
      return {"mlp_dim": hidden}
    fields.expect("expert_gating_func", 1, why="gates are a softmax here")
    fields.expect("expert_weights_scale", 1.0, 0.0, why="gates are not scaled")
    fields.expect("expert_group_count", 0, 1, why="experts have no groups")
    fields.expect("leading_dense_block_count", 0, why="all layers have experts")
    fields.ignore("expert_shared_count")
    renormalise = self.architecture != "qwen2moe"
    moe: dict[str, Any] = dict(
      num_experts=fields.take("expert_count", int),
      top_k=fields.take("expert_used_count", int),
      router_order="softmax_then_topk",
      renormalise=fields.take("expert_weights_norm", bool, renormalise),
    )
    if self.architecture == "llama":
      moe["router_order"] = "topk_then_softmax"
    if self.architecture == "qwen2moe":
      moe["shared_expert_dim"] = fields.take(
        "expert_shared_feed_forward_length", int, hidden
      )
    own = fields.take("expert_feed_forward_length", int, hidden)
    made = fields.make(lambda: MoeConfig(**moe), since=before)
    return {"mlp_dim": own, "moe": made}

  def texts(self, *, with_tokenizer: bool = True) -> Texts:
    """Tokenizer, stop tokens and chat template.

    Args:
      with_tokenizer: whether to make the tokenizer.

    Raises:
      errors.UserError: where the tokenizer is of a kind that is not known.
    """
    ids = [
      self._metadata.get(f"tokenizer.ggml.{name}_token_id")
      for name in ("eos", "eot", "eom")
    ]
    tokenizer = None
    if with_tokenizer:
      tokenizer = gguf_tokenizer.to_json(self._metadata, what=self._what)
    return Texts(
      tokenizer=tokenizer,
      stop_tokens=tuple(dict.fromkeys(i for i in ids if i is not None)),
      begin_token=self._metadata.get("tokenizer.ggml.bos_token_id"),
      chat_template=self._metadata.get("tokenizer.chat_template"),
    )


def _shortest(value: float) -> float:
  """The number that was meant by a float32: 1e-5, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))
