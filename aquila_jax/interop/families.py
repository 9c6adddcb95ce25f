"""The families of transformers that are configurations of DecoderLM.

A family is a row of a table: what its classes in transformers fix, and what
their config.json calls the rest. One function reads any row, one writes it.
Defaults are those of transformers, which leaves them out of config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from aquila_jax.core import errors
from aquila_jax.core.model_config import (
  LayerPattern,
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
  MoeConfig,
  RopeScaling,
)
from aquila_jax.interop import names
from aquila_jax.interop.fields import Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What a model class of transformers fixes."""

  model_type: str
  architecture: str
  tensors: Mapping[str, str]  # of names.py
  # Which biases: none, of Q, K and V, or all four; or a key that says.
  bias: Literal["none", "qkv", "all_by_attention_bias", "qkv_by_qkv_bias"]
  qk_norm: bool = False
  # The window: none, `sliding_window`, or that under `use_sliding_window`, of
  # the layers that `layer_types` names.
  window: Literal["none", "plain", "flagged"] = "none"
  default_window: int | None = None
  experts: Literal["none", "mixtral", "qwen"] = "none"
  shared_expert: bool = False
  default_context: int = 32768
  default_theta: float = 1e4
  default_epsilon: float = 1e-6


FAMILIES = {
  family.model_type: family
  for family in (
    Family(
      model_type="llama",
      architecture="LlamaForCausalLM",
      tensors=names.HF_DENSE,
      bias="all_by_attention_bias",
      default_context=2048,
    ),
    Family(
      model_type="mistral",
      architecture="MistralForCausalLM",
      tensors=names.HF_DENSE,
      bias="none",
      window="plain",
      default_window=4096,
      default_context=131072,
    ),
    Family(
      model_type="qwen2",
      architecture="Qwen2ForCausalLM",
      tensors=names.HF_DENSE,
      bias="qkv",
      window="flagged",
    ),
    Family(
      model_type="qwen3",
      architecture="Qwen3ForCausalLM",
      tensors=names.HF_DENSE,
      bias="all_by_attention_bias",
      qk_norm=True,
      window="flagged",
    ),
    Family(
      model_type="mixtral",
      architecture="MixtralForCausalLM",
      tensors=names.HF_MIXTRAL,
      bias="none",
      window="plain",
      experts="mixtral",
      default_context=131072,
      default_theta=1e6,
      default_epsilon=1e-5,
    ),
    Family(
      model_type="qwen2_moe",
      architecture="Qwen2MoeForCausalLM",
      tensors=names.HF_QWEN_MOE,
      bias="qkv_by_qkv_bias",
      window="flagged",
      experts="qwen",
      shared_expert=True,
    ),
    Family(
      model_type="qwen3_moe",
      architecture="Qwen3MoeForCausalLM",
      tensors=names.HF_QWEN_MOE,
      bias="all_by_attention_bias",
      qk_norm=True,
      window="flagged",
      experts="qwen",
    ),
  )
}

# The width of an idle shared expert, where a class must have one. Not 0:
# llama.cpp takes that for "as wide as the FFN". 32 is the block of its
# quantized types.
_IDLE_SHARED_DIM = 32

# Keys that change no logit of a forward pass, or that other code reads.
_IGNORED = (
  "_name_or_path",
  "architectures",
  "attention_dropout",
  "attn_implementation",
  "bos_token_id",
  "chunk_size_feed_forward",
  "dtype",
  "eos_token_id",
  "id2label",
  "is_encoder_decoder",
  "label2id",
  "model_type",
  "output_attentions",
  "output_hidden_states",
  "output_router_logits",
  "pad_token_id",
  "pretraining_tp",
  "problem_type",
  "return_dict",
  "router_aux_loss_coef",
  "router_jitter_noise",
  "torch_dtype",
  "transformers_version",
  "use_cache",
)


def read_config(
  tree: Mapping[str, Any], *, what: str, dtype: Any = "float32"
) -> tuple[Family, ModelConfig, list[str]]:
  """The family and architecture that a config.json describes.

  Args:
    tree: the content of config.json.
    what: the file, for messages.
    dtype: of the parameters and of computation.

  Returns:
    The family, the configuration, and the keys that are not known here.

  Raises:
    errors.UserError: naming everything that cannot be represented.
  """
  model_type = tree.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise errors.UserError(
      f"{what}: model_type={model_type!r} cannot be imported; expected one of"
      f" {', '.join(FAMILIES)}"
    )
  family, fields = FAMILIES[model_type], Fields(tree, what=what)
  fields.ignore(*_IGNORED)
  fields.expect("hidden_act", "silu", "swish", why="the FFN is SwiGLU")
  fields.expect("mlp_bias", False, why="an FFN has no biases here")
  if fields.has("quantization_config"):
    fields.refuse("quantization_config: quantized weights cannot be imported")
  heads = fields.take("num_attention_heads", int)
  width = fields.take("hidden_size", int)
  context = fields.take("max_position_embeddings", int, family.default_context)
  num_layers = fields.take("num_hidden_layers", int)
  qkv_bias, out_bias = _read_bias(family, fields)
  theta, scaling = _read_rope(family, fields, context=context)
  values = dict(
    vocab_size=fields.take("vocab_size", int),
    num_layers=num_layers,
    embed_dim=width,
    num_heads=heads,
    num_kv_heads=fields.take("num_key_value_heads", int, heads),
    head_dim=fields.take("head_dim", int, width // max(heads, 1)),
    context_length=context,
    rope_theta=theta,
    rope_scaling=scaling,
    sliding_window=_read_window(
      family, fields, context=context, num_layers=num_layers
    ),
    norm_epsilon=fields.take("rms_norm_eps", float, family.default_epsilon),
    qkv_bias=qkv_bias,
    out_bias=out_bias,
    qk_norm=family.qk_norm,
    tied_embeddings=fields.take("tie_word_embeddings", bool, False),
    init_std=fields.take("initializer_range", float, 0.02) or 0.02,
    param_dtype=dtype,
    compute_dtype=dtype,
  )
  values |= _read_ffn(family, fields, num_layers=num_layers)
  fields.check()
  return family, _model_config(values, what=what), fields.unknown


def write_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
  """The family that an architecture is exported to, and its config.json.

  Args:
    config: the architecture.

  Returns:
    The family and the keys that describe the architecture.

  Raises:
    errors.UserError: where no stock class computes the same; it names the
      field.
  """
  family = _choose(config)
  tree = {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.dense_mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.context_length,
    "initializer_range": config.init_std,
    "rms_norm_eps": config.norm_epsilon,
    # Both spellings: before and since version 5 of transformers.
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_tree(config.rope_scaling),
    "rope_parameters": {
      "rope_theta": config.rope_theta,
      **(_rope_tree(config.rope_scaling) or {"rope_type": "default"}),
    },
    "tie_word_embeddings": config.tied_embeddings,
    "attention_dropout": 0.0,
    "use_cache": True,
  }
  tree |= _bias_tree(family, config) | _window_tree(family, config)
  return family, tree | _moe_tree(family, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdleTensor:
  """A tensor of one value that a class has and that changes nothing."""

  shape: tuple[int, ...]
  value: int = 0


def idle_tensors(family: Family, config: ModelConfig) -> dict[str, IdleTensor]:
  """Tensors that the class of a family has and the model has not.

  Biases are zeros: those of all four projections come together in Llama, Qwen3
  and Qwen3-MoE; vLLM's Qwen2-MoE has those of Q, K and V whatever the config
  says. Qwen2-MoE always has a shared expert: it is zeros too, but for the gate
  in front of it, since llama.cpp divides by that gate's logit.

  Args:
    family: of `write_config`.
    config: of the model.

  Returns:
    Every such tensor by name.
  """
  layer = "model.layers.{layer}."
  found: dict[str, IdleTensor] = {}
  all_four = family.bias == "all_by_attention_bias"
  any_bias = config.qkv_bias or config.out_bias
  biases: dict[str, int] = {}
  if not config.qkv_bias and (
    (all_four and any_bias) or family.bias == "qkv_by_qkv_bias"
  ):
    biases["q_proj"] = config.num_heads * config.head_dim
    biases["k_proj"] = config.num_kv_heads * config.head_dim
    biases["v_proj"] = config.num_kv_heads * config.head_dim
  if all_four and any_bias and not config.out_bias:
    biases["o_proj"] = config.embed_dim
  for name, size in biases.items():
    found[f"{layer}self_attn.{name}.bias"] = IdleTensor(shape=(size,))
  if family.shared_expert and config.moe and not config.moe.shared_expert_dim:
    width, hidden = config.embed_dim, _IDLE_SHARED_DIM
    prefix = f"{layer}mlp.shared_expert"
    found[f"{prefix}.gate_proj.weight"] = IdleTensor(shape=(hidden, width))
    found[f"{prefix}.up_proj.weight"] = IdleTensor(shape=(hidden, width))
    found[f"{prefix}.down_proj.weight"] = IdleTensor(shape=(width, hidden))
    found[f"{prefix}_gate.weight"] = IdleTensor(shape=(1, width), value=1)
  return {
    name.format(layer=i): tensor
    for name, tensor in found.items()
    for i in (
      config.moe_layers if "shared_expert" in name else range(config.num_layers)
    )
  }


def check_no_mask(config: ModelConfig) -> None:
  """Refuses a model of which new parts count less than in full.

  Raises:
    errors.UserError: saying what finishes it.
  """
  mask = config.growth_mask
  if mask is not None:
    raise errors.UserError(
      f"model.growth_mask: its value is {mask.value:g}; no stock class has a"
      " mask, expected None; train the model on with train.mask_steps until"
      " the mask is 1"
    )


def _choose(config: ModelConfig) -> Family:
  check_no_mask(config)
  moe = config.moe
  if config.qk_norm and config.head_norm_epsilon != config.norm_epsilon:
    raise errors.UserError(
      f"model.qk_norm_epsilon={config.qk_norm_epsilon}: the stock classes have"
      f" one epsilon for all norms; expected norm_epsilon={config.norm_epsilon}"
    )
  if moe is None:
    if config.qk_norm:
      return FAMILIES["qwen3"]
    # Of these classes Llama alone refuses heads that do not divide the width.
    divides = config.embed_dim % config.num_heads == 0
    if config.out_bias:
      if not divides:
        raise errors.UserError(
          f"model.num_heads={config.num_heads}: the stock class with out_bias"
          " and no qk_norm, Llama, needs a divisor of embed_dim="
          f"{config.embed_dim}"
        )
      return _without_window(FAMILIES["llama"], config)
    if config.qkv_bias:
      return FAMILIES["qwen2"]
    is_llama = config.sliding_window is None and divides
    return FAMILIES["llama" if is_llama else "mistral"]
  _check_router(moe)
  if moe.shared_expert_dim and not moe.shared_expert_gate:
    raise errors.UserError(
      "model.moe.shared_expert_gate=False: no stock class of transformers has"
      " these experts with an ungated shared one; expected True"
    )
  if config.qk_norm:
    if moe.shared_expert_dim:
      raise errors.UserError(
        f"model.moe.shared_expert_dim={moe.shared_expert_dim}: the stock class"
        " with qk_norm and experts, Qwen3-MoE, has no shared expert; expected 0"
      )
    return FAMILIES["qwen3_moe"]
  if config.out_bias:
    raise errors.UserError(
      "model.out_bias=True: no stock class of transformers has it beside these"
      " experts; expected False"
    )
  if (
    config.qkv_bias
    or moe.shared_expert_dim
    or not moe.gates_sum_to_one
    or config.is_mixed  # Mixtral has experts in all layers
  ):
    return FAMILIES["qwen2_moe"]
  return FAMILIES["mixtral"]


def _check_router(moe: MoeConfig) -> None:
  """Refuses what no router of the stock classes computes.

  Jitter and noise are training's, and a capacity never is of inference.
  """
  for name, needed in (
    ("gate_scale", 1.0),
    ("choice", "token"),
    ("selection_bias", False),
    ("logit_normalisation", None),
    ("top_groups", moe.num_groups),
  ):
    given = getattr(moe, name)
    if given != needed:
      raise errors.UserError(
        f"model.moe.{name}={given!r}: no stock class of transformers has it"
        f" beside this attention; expected {needed!r}"
      )
  if moe.router_order == "sigmoid":
    raise errors.UserError(
      "model.moe.router_order='sigmoid': no stock class of transformers has it"
      " beside this attention; expected topk_then_softmax or softmax_then_topk"
    )


def _without_window(family: Family, config: ModelConfig) -> Family:
  if config.sliding_window is not None:
    raise errors.UserError(
      f"model.sliding_window={config.sliding_window}: the stock class with"
      " out_bias and no qk_norm, Llama, has no window; expected None"
    )
  return family


def _model_config(values: dict[str, Any], *, what: str) -> ModelConfig:
  try:
    return ModelConfig(**values)
  except ValueError as error:
    raise errors.UserError(f"{what}: {error}") from error


def _read_bias(family: Family, fields: Fields) -> tuple[bool, bool]:
  """Of Q, K and V, and of the output."""
  if family.bias == "none":
    fields.expect("attention_bias", False, why="this family has no biases")
    return False, False
  if family.bias == "qkv":
    return True, False
  if family.bias == "qkv_by_qkv_bias":
    return fields.take("qkv_bias", bool, True), False
  both = fields.take("attention_bias", bool, False)
  return both, both


def _bias_tree(family: Family, config: ModelConfig) -> dict[str, Any]:
  if family.bias == "all_by_attention_bias":
    return {"attention_bias": config.qkv_bias or config.out_bias}
  if family.bias == "qkv_by_qkv_bias":
    return {"qkv_bias": True}  # see idle_tensors
  return {}


def _read_rope(
  family: Family, fields: Fields, *, context: int
) -> tuple[float, RopeScaling | None]:
  """Base and scaling, in the spelling of transformers 5 or of those before."""
  tree = fields.take("rope_parameters", dict, {})
  old = fields.take("rope_scaling", dict, {})
  theta = fields.take("rope_theta", float, family.default_theta)
  rope = Fields({**old, **tree}, what="rope")
  partial = fields.take("partial_rotary_factor", float, 1.0)
  if rope.take("partial_rotary_factor", float, partial) != 1:
    fields.refuse("partial_rotary_factor: heads are rotated whole here")
  theta = rope.take("rope_theta", float, theta)
  kind = rope.take("rope_type", str, rope.take("type", str, "default"))
  scaling: RopeScaling | None = None
  if kind == "linear":
    factor = rope.take("factor", float)
    scaling = rope.make(lambda: LinearRopeScaling(factor=factor))
  elif kind == "llama3":
    values: dict[str, Any] = dict(
      factor=rope.take("factor", float),
      low_freq_factor=rope.take("low_freq_factor", float),
      high_freq_factor=rope.take("high_freq_factor", float),
      original_context_length=rope.take(
        "original_max_position_embeddings", int, context
      ),
    )
    scaling = rope.make(lambda: Llama3RopeScaling(**values))
  elif kind != "default":
    fields.refuse(
      f"rope_type={kind!r}: expected default, linear or llama3; no other"
      " scaling of RoPE is there"
    )
  for problem in rope.problems:
    fields.refuse(f"rope_scaling: {problem}")
  if kind in ("default", "linear", "llama3"):
    for name in rope.unknown:
      fields.refuse(f"rope_scaling.{name}: is not a field of type {kind!r}")
  return theta, scaling


def _rope_tree(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  if isinstance(scaling, LinearRopeScaling):
    return {"rope_type": "linear", "factor": scaling.factor}
  return {
    "rope_type": "llama3",
    "factor": scaling.factor,
    "low_freq_factor": scaling.low_freq_factor,
    "high_freq_factor": scaling.high_freq_factor,
    "original_max_position_embeddings": scaling.original_context_length,
  }


def _read_window(
  family: Family, fields: Fields, *, context: int, num_layers: int
) -> int | None:
  """The window of every layer; layers that differ are refused.

  A window as long as the context hides nothing and is none.
  """
  if family.window == "none":
    fields.expect("sliding_window", None, why="this family has no window")
    return None
  if family.window == "plain":
    # null is no window, and not the default.
    given = "sliding_window" in fields
    window = fields.take(
      "sliding_window", int, 0 if given else family.default_window or 0
    )
    sliding = num_layers
  else:
    window = fields.take("sliding_window", int, 4096)
    first = fields.take("max_window_layers", int, 28)
    used = fields.take("use_sliding_window", bool, False)
    kinds = fields.take("layer_types", list, [])
    sliding = kinds.count("sliding_attention")
    if not used:
      window = 0
    elif family.model_type == "qwen3_moe":
      sliding = num_layers
    elif kinds and sliding + kinds.count("full_attention") != num_layers:
      fields.refuse(
        f"layer_types={kinds!r}: expected full_attention or sliding_attention"
        f" for each of {num_layers} layers"
      )
      return None
    elif not kinds and family.model_type == "qwen2_moe":
      sliding = len(range(0, min(first, num_layers), 2))
    elif not kinds:
      sliding = max(num_layers - first, 0)
  if not sliding or not window or window >= context:
    return None
  if sliding < num_layers:
    fields.refuse(
      f"sliding_window={window}: {sliding} of {num_layers} layers have it;"
      " here all or none can"
    )
  return window


def _window_tree(family: Family, config: ModelConfig) -> dict[str, Any]:
  window = config.sliding_window
  if family.window == "none":
    return {}
  if family.window == "plain":
    return {"sliding_window": window}
  tree = {"use_sliding_window": window is not None, "sliding_window": window}
  if window is not None:
    # The rule of Qwen2 and Qwen3; then what transformers goes by.
    tree["max_window_layers"] = 0
    tree["layer_types"] = ["sliding_attention"] * config.num_layers
  return tree


def _read_ffn(
  family: Family, fields: Fields, *, num_layers: int
) -> dict[str, Any]:
  if family.experts == "none":
    fields.ignore("moe_intermediate_size")
    return {"mlp_dim": fields.take("intermediate_size", int)}
  before = len(fields.problems)
  if family.experts == "mixtral":
    mlp_dim = fields.take("intermediate_size", int)
    moe: dict[str, Any] = dict(
      top_k=fields.take("num_experts_per_tok", int, 2),
      num_experts=fields.take("num_local_experts", int, 8),
    )
  else:
    mlp_dim = fields.take("moe_intermediate_size", int)
    layers = _read_layers(fields, num_layers=num_layers)
    dense_mlp_dim = _read_dense_dim(fields, layers, mlp_dim=mlp_dim)
    # Version 5 of transformers writes Qwen3-MoE's under Mixtral's name.
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    moe = dict(
      top_k=fields.take("num_experts_per_tok", int),
      num_experts=fields.take(name, int),
      router_order="softmax_then_topk",
      renormalise=fields.take("norm_topk_prob", bool, False),
      layers=layers,
      dense_mlp_dim=dense_mlp_dim,
    )
    fields.ignore("num_experts", "num_local_experts")
  if family.shared_expert:
    shared = fields.take("shared_expert_intermediate_size", int)
    moe["shared_expert_dim"] = shared
  made = fields.make(lambda: MoeConfig(**moe), since=before)
  return {"mlp_dim": mlp_dim, "moe": made}


def _read_layers(
  fields: Fields, *, num_layers: int
) -> LayerPattern | tuple[int, ...]:
  """The layers with experts: each step-th, but for those of a list."""
  step = fields.take("decoder_sparse_step", int, 1)
  dense = fields.take("mlp_only_layers", list, [])
  if step < 1:
    fields.refuse(f"decoder_sparse_step={step}: expected at least 1")
    return "all"
  layers = tuple(
    i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense
  )
  if len(layers) == num_layers:
    return "all"
  if not layers:
    fields.refuse(
      f"mlp_only_layers={dense}, decoder_sparse_step={step}: none of"
      f" {num_layers} layers has experts; expected some"
    )
    return "all"
  return layers


def _read_dense_dim(
  fields: Fields, layers: LayerPattern | tuple[int, ...], *, mlp_dim: int
) -> int | None:
  """The width of layers without experts, where it is not that of an expert."""
  fields.ignore("intermediate_size")
  if layers == "all":
    return None
  width = fields.take("intermediate_size", int)
  return None if width == mlp_dim else width


def _moe_tree(family: Family, config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  if moe is None:
    return {}
  tree = {
    "num_experts_per_tok": moe.top_k,
    "output_router_logits": False,
    "num_local_experts": moe.num_experts,
  }
  if family.experts == "mixtral":
    return tree
  tree |= {
    "num_experts": moe.num_experts,
    "moe_intermediate_size": config.mlp_dim,
    "norm_topk_prob": moe.gates_sum_to_one,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [
      i for i in range(config.num_layers) if i not in config.moe_layers
    ],
  }
  if family.shared_expert:
    shared = moe.shared_expert_dim or _IDLE_SHARED_DIM
    tree["shared_expert_intermediate_size"] = shared
  return tree
