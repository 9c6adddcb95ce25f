"""config.json of every family: read, written, and refused by full text."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from aquila_jax.core.errors import UserError
from aquila_jax.core.model_config import (
  GrowthMask,
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
  MoeConfig,
)
from aquila_jax.interop import families
from tests.interop import tiny

SIZES: dict[str, Any] = dict(
  vocab_size=61,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
)
MOE_SIZES: dict[str, Any] = dict(
  num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
)
EXTRA: dict[str, dict[str, Any]] = {
  "qwen2_moe": MOE_SIZES | dict(shared_expert_intermediate_size=12),
  "qwen3_moe": MOE_SIZES,
}


def _tree(model_type: str, **fields: Any) -> dict[str, Any]:
  tree = dict(model_type=model_type) | SIZES | EXTRA.get(model_type, {})
  return tree | fields


def _read(model_type: str, **fields: Any) -> ModelConfig:
  tree = _tree(model_type, **fields)
  return families.read_config(tree, what="config.json")[1]


def _refusal(model_type: str, **fields: Any) -> str:
  with pytest.raises(UserError) as caught:
    _read(model_type, **fields)
  return str(caught.value)


# What transformers' classes take where config.json does not say.
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": dict(context_length=2048),
  "mistral": dict(context_length=131072, sliding_window=4096),
  "qwen2": dict(qkv_bias=True),
  "qwen3": dict(qk_norm=True),
  "mixtral": dict(
    context_length=131072,
    rope_theta=1e6,
    norm_epsilon=1e-5,
    moe=MoeConfig(num_experts=8, top_k=2),
  ),
  "qwen2_moe": dict(
    mlp_dim=8,
    qkv_bias=True,
    moe=MoeConfig(
      num_experts=4,
      top_k=2,
      router_order="softmax_then_topk",
      renormalise=False,
      shared_expert_dim=12,
    ),
  ),
  "qwen3_moe": dict(
    mlp_dim=8,
    qk_norm=True,
    moe=MoeConfig(
      num_experts=4,
      top_k=2,
      router_order="softmax_then_topk",
      renormalise=False,
    ),
  ),
}


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_keys_that_are_left_out_have_transformers_defaults(model_type):
  defaults: dict[str, Any] = dict(
    vocab_size=61,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    context_length=32768,
    rope_theta=1e4,
    norm_epsilon=1e-6,
    qkv_bias=False,
    compute_dtype="float32",
  )
  expected = ModelConfig(**(defaults | DEFAULTS[model_type]))
  assert _read(model_type) == expected
  # null says no more than nothing does.
  assert _read(model_type, head_dim=None, num_key_value_heads=None) == expected


@pytest.mark.parametrize("name", tiny.KINDS)
def test_what_is_written_is_read_as_the_same_model(name):
  config, architecture = tiny.KINDS[name]
  family, tree = families.write_config(config)
  assert tree["architectures"] == [family.architecture] == [architecture]
  found, read, unknown = families.read_config(
    json.loads(json.dumps(tree)), what="it", dtype=config.param_dtype
  )
  assert (found, unknown) == (family, [])
  # What the class must have beside the model's own is read as the class's.
  expected: dict[str, Any] = {}
  if family.bias == "all_by_attention_bias":
    both = config.qkv_bias or config.out_bias
    expected = dict(qkv_bias=both, out_bias=both)
  elif family.bias == "qkv_by_qkv_bias":
    expected = dict(qkv_bias=True)
  if config.moe is not None:
    moe = dataclasses.replace(
      config.moe,
      block_size=MoeConfig().block_size,
      router_order="topk_then_softmax"
      if family.experts == "mixtral"
      else "softmax_then_topk",
      renormalise=config.moe.gates_sum_to_one,
      layers=config.moe_layers if config.is_mixed else "all",
    )
    if family.shared_expert and not moe.shared_expert_dim:
      moe = dataclasses.replace(moe, shared_expert_dim=32)
    expected["moe"] = moe
  assert read == dataclasses.replace(config, **expected)


def test_idle_tensors_fill_what_the_class_has_and_the_model_has_not():
  shapes, ones = {}, set()
  for name in tiny.KINDS:
    config = tiny.KINDS[name][0]
    family, _ = families.write_config(config)
    idle = families.idle_tensors(family, config)
    shapes[name] = {key: tensor.shape for key, tensor in idle.items()}
    ones |= {key for key, tensor in idle.items() if tensor.value == 1}
    assert {tensor.value for tensor in idle.values()} <= {0, 1}
  layers = ("model.layers.0.", "model.layers.1.")
  third = "model.layers.2."
  # N H = 16, K H = 8, D = 8.
  qkv = {"q_proj": (16,), "k_proj": (8,), "v_proj": (8,)}
  shared = {
    "shared_expert.gate_proj.weight": (32, 8),
    "shared_expert.up_proj.weight": (32, 8),
    "shared_expert.down_proj.weight": (8, 32),
    "shared_expert_gate.weight": (1, 8),
  }
  without_qkv = {
    f"{layer}self_attn.{name}.bias": shape
    for layer in layers
    for name, shape in qkv.items()
  }
  without_out = {f"{layer}self_attn.o_proj.bias": (8,) for layer in layers}
  without_shared = {
    f"{layer}mlp.{name}": shape
    for layer in layers
    for name, shape in shared.items()
  }
  assert {name: found for name, found in shapes.items() if found} == {
    "out bias": without_qkv,
    "qk_norm, qkv bias, window, tied": without_out,
    "experts, qkv bias": without_shared,
    "experts, gates below one": without_shared | without_qkv,
    "shared expert": without_qkv,
    # Layers 0 and 2 of 3.
    "experts in some layers": {
      f"{layer}self_attn.{name}.bias": shape
      for layer in (*layers, third)
      for name, shape in qkv.items()
    }
    | {
      f"{layer}mlp.{name}": shape
      for layer in (layers[0], third)
      for name, shape in shared.items()
    },
    "experts in some layers, wider others": {
      f"{layer}self_attn.{name}.bias": shape
      for layer in (*layers, third)
      for name, shape in qkv.items()
    },
    "experts, qk_norm, out bias": without_qkv,
  }
  # Elsewhere 0 / 0: llama.cpp has the sigmoid of it as silu(x) / x.
  assert ones == {
    f"{layer}mlp.shared_expert_gate.weight" for layer in (*layers, third)
  }


ROPE: dict[str, tuple[dict[str, Any], Any]] = {
  "new": (dict(rope_parameters=dict(rope_theta=5.0)), (5.0, None)),
  "old": (dict(rope_theta=5), (5.0, None)),
  "new before old": (
    dict(rope_parameters=dict(rope_theta=5.0), rope_theta=6.0),
    (5.0, None),
  ),
  "null": (
    dict(rope_parameters=None, rope_scaling=None, rope_theta=None),
    (1e4, None),
  ),
  "new linear": (
    dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5.0)),
    (5.0, LinearRopeScaling(factor=2.0)),
  ),
  "old linear": (
    dict(rope_scaling=dict(type="linear", factor=2), rope_theta=5.0),
    (5.0, LinearRopeScaling(factor=2.0)),
  ),
  "llama3": (
    dict(
      rope_theta=5.0,
      rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    ),
    (
      5.0,
      Llama3RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context_length=32,
      ),
    ),
  ),
  "llama3 of the context": (
    dict(
      max_position_embeddings=64,
      rope_parameters=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
      ),
    ),
    (
      1e4,
      Llama3RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context_length=64,
      ),
    ),
  ),
}


@pytest.mark.parametrize("name", ROPE)
def test_rope_is_read_in_the_old_and_the_new_spelling(name):
  fields, expected = ROPE[name]
  config = _read("llama", **fields)
  assert (config.rope_theta, config.rope_scaling) == expected


SLIDING, FULL = "sliding_attention", "full_attention"
FLAG: dict[str, Any] = dict(use_sliding_window=True, sliding_window=7)
WINDOWS: list[tuple[str, dict[str, Any], int | None]] = [
  ("mistral", dict(sliding_window=7), 7),
  ("mistral", dict(sliding_window=None), None),
  ("mistral", {}, 4096),
  # No token is that far away.
  ("mistral", dict(sliding_window=64, max_position_embeddings=64), None),
  ("mixtral", {}, None),
  ("mixtral", dict(sliding_window=7), 7),
  ("qwen2", dict(sliding_window=7), None),
  ("qwen2", FLAG | dict(max_window_layers=0), 7),
  ("qwen2", FLAG | dict(max_window_layers=2), None),
  ("qwen2", FLAG, None),  # of layers from the 28th on
  ("qwen3", FLAG | dict(layer_types=[SLIDING] * 2), 7),
  ("qwen3", FLAG | dict(layer_types=[FULL] * 2, max_window_layers=0), None),
  ("qwen3", FLAG | dict(sliding_window=None, max_window_layers=0), 4096),
  ("qwen3_moe", FLAG | dict(max_window_layers=28), 7),
  ("qwen2_moe", FLAG | dict(num_hidden_layers=1), 7),
  ("qwen2_moe", FLAG | dict(layer_types=[SLIDING] * 2), 7),
]


@pytest.mark.parametrize(("model_type", "fields", "window"), WINDOWS)
def test_a_window_is_that_of_all_layers(model_type, fields, window):
  assert _read(model_type, **fields).sliding_window == window


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
  "biases of the FFN": (
    "llama",
    dict(mlp_bias=True),
    "mlp_bias=True: expected False; an FFN has no biases here",
  ),
  "another activation": (
    "llama",
    dict(hidden_act="gelu"),
    "hidden_act='gelu': expected 'silu' or 'swish'; the FFN is SwiGLU",
  ),
  "quantized": (
    "llama",
    dict(quantization_config=dict(quant_method="gptq")),
    "quantization_config: quantized weights cannot be imported",
  ),
  "yarn": (
    "qwen3",
    dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "rope_type='yarn': expected default, linear or llama3; no other scaling of"
    " RoPE is there",
  ),
  "a field of another scaling": (
    "llama",
    dict(rope_parameters=dict(rope_theta=1e4, factor=2.0)),
    "rope_scaling.factor: is not a field of type 'default'",
  ),
  "linear without a factor": (
    "llama",
    dict(rope_scaling=dict(type="linear")),
    "rope_scaling: factor is missing",
  ),
  "linear by nothing": (
    "llama",
    dict(rope_scaling=dict(type="linear", factor=0)),
    "rope_scaling: factor=0.0: need > 0",
  ),
  "no dict": (
    "llama",
    dict(rope_parameters="x"),
    "rope_parameters='x': expected dict",
  ),
  "half of a head": (
    "llama",
    dict(partial_rotary_factor=0.5),
    "partial_rotary_factor: heads are rotated whole here",
  ),
  "half of a head in the new spelling": (
    "llama",
    dict(rope_parameters=dict(partial_rotary_factor=0.5)),
    "partial_rotary_factor: heads are rotated whole here",
  ),
  "biases of Mistral": (
    "mistral",
    dict(attention_bias=True),
    "attention_bias=True: expected False; this family has no biases",
  ),
  "a window of Llama": (
    "llama",
    dict(sliding_window=7),
    "sliding_window=7: expected None; this family has no window",
  ),
  "a window of some layers": (
    "qwen3",
    FLAG | dict(layer_types=[SLIDING, FULL]),
    "sliding_window=7: 1 of 2 layers have it; here all or none can",
  ),
  "a window of later layers": (
    "qwen2",
    FLAG | dict(max_window_layers=1),
    "sliding_window=7: 1 of 2 layers have it; here all or none can",
  ),
  "a window of every other layer": (
    "qwen2_moe",
    FLAG,
    "sliding_window=7: 1 of 2 layers have it; here all or none can",
  ),
  "layers of another kind": (
    "qwen3",
    FLAG | dict(layer_types=[SLIDING, "linear_attention"]),
    "layer_types=['sliding_attention', 'linear_attention']: expected"
    " full_attention or sliding_attention for each of 2 layers",
  ),
  "layers without experts of no width": (
    "qwen3_moe",
    dict(mlp_only_layers=[0], intermediate_size=None),
    "intermediate_size is missing",
  ),
  "layers without experts or hidden units": (
    "qwen2_moe",
    dict(mlp_only_layers=[0], intermediate_size=0),
    "dense_mlp_dim=0: need >= 1, or None for mlp_dim",
  ),
  "no layer with experts": (
    "qwen2_moe",
    dict(decoder_sparse_step=2, mlp_only_layers=[1]),
    "mlp_only_layers=[1], decoder_sparse_step=2: none of 2 layers has experts;"
    " expected some",
  ),
  "no step": (
    "qwen2_moe",
    dict(decoder_sparse_step=0),
    "decoder_sparse_step=0: expected at least 1",
  ),
  "another type": (
    "llama",
    dict(hidden_size="16"),
    "hidden_size='16': expected int",
  ),
  "a missing field": ("llama", dict(vocab_size=None), "vocab_size is missing"),
  "a missing number of experts a token": (
    "qwen3_moe",
    dict(num_experts_per_tok=None),
    "num_experts_per_tok is missing",
  ),
  "more experts a token than there are": (
    "qwen2_moe",
    dict(num_experts_per_tok=9),
    "top_k=9: need 1 <= top_k <= num_experts=4",
  ),
  "heads that do not divide": (
    "llama",
    dict(num_key_value_heads=3),
    "num_heads=4 is not a multiple of num_kv_heads=3",
  ),
  "no number": (
    "llama",
    dict(rms_norm_eps=float("nan")),
    "rms_norm_eps=nan: expected a finite number",
  ),
}


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
  ("fields", "layers"),
  [
    ({}, "all"),
    (dict(decoder_sparse_step=2), (1, 3, 5)),
    (dict(decoder_sparse_step=3), (2, 5)),
    (dict(mlp_only_layers=[0, 4]), (1, 2, 3, 5)),
    (dict(decoder_sparse_step=2, mlp_only_layers=[1, 2]), (3, 5)),
  ],
  ids=str,
)
@pytest.mark.parametrize("width", [8, 24])
def test_layers_with_experts_are_read_and_written(
  model_type, fields, layers, width
):
  sizes = dict(num_hidden_layers=6, intermediate_size=width)
  config = _read(model_type, **sizes, **fields)
  assert config.moe is not None and config.moe.layers == layers
  # Experts have 8 hidden units.
  own = width if layers != "all" and width != 8 else None
  assert config.moe.dense_mlp_dim == own
  family, written = families.write_config(config)
  assert family.model_type == model_type
  assert written["decoder_sparse_step"] == 1
  dense = sorted(set(range(6)) - set(config.moe_layers))
  assert written["mlp_only_layers"] == dense
  assert written["moe_intermediate_size"] == 8
  assert written["intermediate_size"] == (own or 8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused(name):
  model_type, fields, message = REFUSED[name]
  assert _refusal(model_type, **fields) == f"config.json: {message}"


@pytest.mark.parametrize("model_type", ["gpt2", None, ["llama"]])
def test_another_family_is_refused(model_type):
  with pytest.raises(UserError) as caught:
    families.read_config({"model_type": model_type}, what="config.json")
  assert str(caught.value) == (
    f"config.json: model_type={model_type!r} cannot be imported; expected one"
    " of llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe"
  )


def test_one_error_names_everything():
  message = _refusal(
    "qwen3_moe",
    hidden_act="relu",
    mlp_bias=True,
    quantization_config={},
    vocab_size=None,
    hidden_size="16",
    num_experts=None,
    mlp_only_layers=[1],
    intermediate_size=None,
    partial_rotary_factor=0.25,
    rope_scaling=dict(rope_type="llama3", factor=True, low_freq_factor=1.0),
  )
  assert message.splitlines() == [
    "config.json: 10 problems",
    "  hidden_act='relu': expected 'silu' or 'swish'; the FFN is SwiGLU",
    "  mlp_bias=True: expected False; an FFN has no biases here",
    "  quantization_config: quantized weights cannot be imported",
    "  hidden_size='16': expected int",
    "  partial_rotary_factor: heads are rotated whole here",
    "  rope_scaling: factor=True: expected float",
    "  rope_scaling: high_freq_factor is missing",
    "  vocab_size is missing",
    "  intermediate_size is missing",
    "  num_local_experts is missing",
  ]


def test_what_is_not_known_is_returned_and_what_changes_nothing_is_not():
  tree = _tree("llama", new_feature=3, torch_dtype="float16", use_cache=True)
  assert families.read_config(tree, what="it")[2] == ["new_feature"]
  # null says nothing.
  assert _read("llama", quantization_config=None) == _read("llama")


ROUTERS: list[tuple[dict[str, Any], str, str]] = [
  (dict(gate_scale=2.0), "gate_scale=2.0", "1.0"),
  (dict(selection_bias=True), "selection_bias=True", "False"),
  (dict(logit_normalisation=1.0), "logit_normalisation=1.0", "None"),
  (dict(num_groups=4), "top_groups=1", "4"),
  (
    dict(choice="expert", router_order="sigmoid", renormalise=False),
    "choice='expert'",
    "'token'",
  ),
]


@pytest.mark.parametrize(("fields", "given", "needed"), ROUTERS)
def test_a_router_of_no_class_is_not_exported(fields, given, needed):
  config = dataclasses.replace(tiny.DENSE, moe=MoeConfig(**fields))
  with pytest.raises(UserError) as caught:
    families.write_config(config)
  assert str(caught.value) == (
    f"model.moe.{given}: no stock class of transformers has it beside this"
    f" attention; expected {needed}"
  )


EXPORTS_REFUSED: dict[str, tuple[ModelConfig, str]] = {
  "an ungated shared expert": (
    dataclasses.replace(
      tiny.DENSE,
      moe=MoeConfig(shared_expert_dim=4, shared_expert_gate=False),
    ),
    "model.moe.shared_expert_gate=False: no stock class of transformers has"
    " these experts with an ungated shared one; expected True",
  ),
  "sigmoid": (
    dataclasses.replace(tiny.DENSE, moe=MoeConfig(router_order="sigmoid")),
    "model.moe.router_order='sigmoid': no stock class of transformers has it"
    " beside this attention; expected topk_then_softmax or softmax_then_topk",
  ),
  "a shared expert with qk_norm": (
    dataclasses.replace(
      tiny.DENSE, qk_norm=True, moe=MoeConfig(shared_expert_dim=4)
    ),
    "model.moe.shared_expert_dim=4: the stock class with qk_norm and experts,"
    " Qwen3-MoE, has no shared expert; expected 0",
  ),
  "experts with an output bias": (
    dataclasses.replace(tiny.DENSE, out_bias=True, moe=MoeConfig()),
    "model.out_bias=True: no stock class of transformers has it beside these"
    " experts; expected False",
  ),
  "an output bias with a window": (
    dataclasses.replace(tiny.DENSE, out_bias=True, sliding_window=7),
    "model.sliding_window=7: the stock class with out_bias and no qk_norm,"
    " Llama, has no window; expected None",
  ),
  "a growth mask": (
    dataclasses.replace(
      tiny.DENSE,
      growth_mask=GrowthMask(
        value=0.25, embed_dim=1, mlp_dim=1, num_kv_heads=1, queries_per_kv=1
      ),
    ),
    "model.growth_mask: its value is 0.25; no stock class has a mask, expected"
    " None; train the model on with train.mask_steps until the mask is 1",
  ),
}


def test_what_only_training_does_is_no_hindrance():
  moe = MoeConfig(input_jitter=0.01, logit_noise=0.1, capacity_factor=1.5)
  config = dataclasses.replace(tiny.DENSE, moe=moe)
  assert families.write_config(config)[0].model_type == "mixtral"


@pytest.mark.parametrize("name", EXPORTS_REFUSED)
def test_what_no_class_computes_is_not_exported(name):
  config, message = EXPORTS_REFUSED[name]
  with pytest.raises(UserError) as caught:
    families.write_config(config)
  assert str(caught.value) == message


def test_config_json_by_hand():
  config = dataclasses.replace(
    tiny.KINDS["qkv bias, window"][0],
    rope_scaling=LinearRopeScaling(factor=2.0),
  )
  family, tree = families.write_config(config)
  assert family.model_type == "qwen2"
  assert tree == {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {
      "rope_theta": 100.0,
      "rope_type": "linear",
      "factor": 2.0,
    },
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "use_cache": True,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 0,
    "layer_types": ["sliding_attention", "sliding_attention"],
  }


@pytest.mark.parametrize(
  ("fields", "architecture"),
  [
    (dict(num_heads=4, embed_dim=8), "LlamaForCausalLM"),
    # Llama's own configuration refuses 8 / 3.
    (dict(num_heads=3, embed_dim=8), "MistralForCausalLM"),
    (dict(num_heads=4, embed_dim=8, sliding_window=5), "MistralForCausalLM"),
    (dict(num_heads=3, embed_dim=8, qkv_bias=True), "Qwen2ForCausalLM"),
  ],
)
def test_heads_that_do_not_divide_the_width_are_no_llama(fields, architecture):
  sizes: dict[str, Any] = dict(
    vocab_size=8,
    num_layers=1,
    mlp_dim=8,
    num_kv_heads=1,
    head_dim=4,
    qkv_bias=False,
  )
  config = ModelConfig(**(sizes | fields))
  _, tree = families.write_config(config)
  assert tree["architectures"] == [architecture]
  # Read again it is what it was, with or without a window.
  again = families.read_config(tree, what="config.json")[1]
  assert again == dataclasses.replace(config, compute_dtype="float32")


def test_an_output_bias_needs_heads_that_divide():
  config = ModelConfig(
    vocab_size=8,
    num_layers=1,
    embed_dim=8,
    mlp_dim=8,
    num_heads=3,
    num_kv_heads=1,
    head_dim=4,
    out_bias=True,
  )
  with pytest.raises(UserError) as caught:
    families.write_config(config)
  assert str(caught.value) == (
    "model.num_heads=3: the stock class with out_bias and no qk_norm, Llama,"
    " needs a divisor of embed_dim=8"
  )
