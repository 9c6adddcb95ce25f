"""Sizes that cannot be a model are refused by the class that owns them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from aquila_jax.core import config
from aquila_jax.core.model_config import (
  GrowthMask,
  ModelConfig,
  MoeConfig,
  differences,
)


def _model(**fields) -> ModelConfig:
  defaults: dict[str, Any] = dict(
    vocab_size=32,
    num_layers=2,
    embed_dim=8,
    mlp_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
  )
  return ModelConfig(**(defaults | fields))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_layers": 0}, "num_layers=0: need >= 1"),
    ({"num_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    ({"head_dim": 5}, "head_dim=5: rotary embeddings need an even width"),
    ({"norm_epsilon": 0.0}, "norm_epsilon=0.0: need > 0"),
    (
      {"moe": MoeConfig(layers=(0, 2))},
      "moe.layers=(0, 2): need layers below num_layers=2",
    ),
    (
      {"num_layers": 1, "moe": MoeConfig(layers="every_second")},
      "moe.layers='every_second': num_layers=1 has none of these layers",
    ),
    (
      {"moe": MoeConfig(dense_mlp_dim=24)},
      "moe.dense_mlp_dim=24: expected None with moe.layers='all', which leaves"
      " no layer a dense FFN",
    ),
    (
      {"moe": MoeConfig(dense_mlp_dim=16, layers=(0, 1))},
      "moe.dense_mlp_dim=16: expected None with moe.layers=(0, 1), which leaves"
      " no layer a dense FFN",
    ),
  ],
)
def test_model_is_refused(fields, message):
  with pytest.raises(ValueError) as error:
    _model(**fields)
  assert str(error.value) == message


EXPERT_CHOICE: dict[str, Any] = dict(
  choice="expert", router_order="sigmoid", renormalise=False
)


def test_a_router_of_zeros_is_taken_with_noise():
  assert MoeConfig(router_init_std=0.0, logit_noise=0.1).is_noisy
  assert not MoeConfig().is_noisy and MoeConfig(input_jitter=0.1).is_noisy


def test_only_token_choice_is_causal():
  assert MoeConfig().is_causal and not MoeConfig(**EXPERT_CHOICE).is_causal


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_experts": 1, "top_k": 1}, "num_experts=1: need >= 2"),
    ({"top_k": 9}, "top_k=9: need 1 <= top_k <= num_experts=8"),
    (
      {"capacity_factor": 0.0},
      "capacity_factor=0.0: need > 0, or None for dropless",
    ),
    ({"block_size": 0}, "block_size=0: need >= 1"),
    (
      {"dense_mlp_dim": 0, "layers": (1,)},
      "dense_mlp_dim=0: need >= 1, or None for mlp_dim",
    ),
    ({"gate_scale": 0.0}, "gate_scale=0.0: need > 0"),
    ({"logit_noise": -1.0}, "logit_noise=-1.0: need >= 0"),
    ({"input_jitter": 1.0}, "input_jitter=1.0: need 0 <= input_jitter < 1"),
    (
      {"layers": (1, 0)},
      "layers=(1, 0): need layers from 0 in rising order, each once, at least"
      " one",
    ),
    (
      {"layers": ()},
      "layers=(): need layers from 0 in rising order, each once, at least one",
    ),
    (
      {"logit_normalisation": 0.0},
      "logit_normalisation=0.0: need > 0, or None",
    ),
    ({"router_init_std": -0.1}, "router_init_std=-0.1: need >= 0"),
    (
      {"router_init_std": 0.0, "input_jitter": 0.1},
      "router_init_std=0.0: need > 0 or logit_noise > 0; a router of zeros has"
      " equal logits, under input_jitter too, and ties send every token to the"
      " first experts",
    ),
    (
      {
        "router_init_std": 0.0,
        "logit_noise": 0.1,
        "logit_normalisation": 1.0,
      },
      "router_init_std=0.0: need > 0 with logit_normalisation=1.0; equal logits"
      " have no deviation to divide by",
    ),
    (
      {"num_groups": 3},
      "num_groups=3: need a divisor of num_experts=8",
    ),
    (
      {"num_groups": 2, "top_groups": 3},
      "top_groups=3: need 1 <= top_groups <= num_groups=2",
    ),
    (
      {"num_groups": 4, "top_groups": 1, "top_k": 3},
      "top_groups=1: so many groups have 2 experts; need at least top_k=3",
    ),
    (
      {"num_groups": 8, "top_groups": 2, "group_score": "top2_sum"},
      "group_score='top2_sum': need two experts a group; num_groups=8 leaves 1",
    ),
    (
      {"choice": "expert"},
      "router_order='topk_then_softmax': need softmax_then_topk or sigmoid with"
      " choice='expert'; an expert ranks tokens by scores",
    ),
    (
      EXPERT_CHOICE | {"renormalise": True},
      "renormalise=True: need False with choice='expert'; the gates are the"
      " scores",
    ),
    (
      EXPERT_CHOICE | {"selection_bias": True},
      "selection_bias=True: need False with choice='expert'; all experts have"
      " the same load",
    ),
    (
      EXPERT_CHOICE | {"num_groups": 2},
      "top_groups=1: need 2 with choice='expert'; tokens choose no groups",
    ),
    (
      EXPERT_CHOICE | {"capacity_factor": 2.0},
      "capacity_factor=2.0: need None with choice='expert'; top_k says how many"
      " tokens an expert takes",
    ),
  ],
)
def test_mixture_is_refused(fields, message):
  with pytest.raises(ValueError) as error:
    MoeConfig(**fields)
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("layers", "of_five", "of_two"),
  [
    ("all", (0, 1, 2, 3, 4), (0, 1)),
    ("every_second", (1, 3), (1,)),
    ("last_half", (2, 3, 4), (1,)),
    ((0, 1), (0, 1), (0, 1)),
  ],
)
def test_layers_with_experts(layers, of_five, of_two):
  moe = MoeConfig(layers=layers)
  for num_layers, expected in ((5, of_five), (2, of_two)):
    model = _model(num_layers=num_layers, moe=moe)
    assert model.moe_layers == expected
    assert model.is_mixed == (len(expected) < num_layers)
  assert _model().moe_layers == () and not _model().is_mixed


def _mask(**fields) -> GrowthMask:
  defaults: dict[str, Any] = dict(
    embed_dim=6, mlp_dim=16, num_kv_heads=1, queries_per_kv=2
  )
  return GrowthMask(**(defaults | fields))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"value": 1.5}, "value=1.5: need 0 <= value <= 1"),
    ({"mlp_dim": 0}, "mlp_dim=0: need >= 1"),
    ({"new_layers": (1, 0)}, "new_layers=(1, 0): need rising order, each once"),
    ({"embed_dim": 9}, "growth_mask.embed_dim=9: need <= 8, the model's own"),
    (
      {"queries_per_kv": 3},
      "growth_mask.queries_per_kv=3: need <= 2, the model's own",
    ),
    (
      {"new_layers": (0, 2)},
      "growth_mask.new_layers=(0, 2): need layers below num_layers=2",
    ),
  ],
)
def test_growth_mask_is_refused(fields, message):
  with pytest.raises(ValueError) as error:
    _model(growth_mask=_mask(**fields))
  assert str(error.value) == message


def test_a_growth_mask_leaves_an_old_layer_with_experts():
  with pytest.raises(ValueError) as error:
    _model(
      growth_mask=_mask(new_layers=(1,)), moe=MoeConfig(layers="every_second")
    )
  assert str(error.value) == (
    "growth_mask.new_layers=(1,): need an old layer among those with experts,"
    " (1,)"
  )


def test_a_growth_mask_is_of_ffns_and_experts_of_one_width():
  moe = MoeConfig(layers="every_second", dense_mlp_dim=24)
  with pytest.raises(ValueError) as error:
    _model(growth_mask=_mask(), moe=moe)
  assert str(error.value) == (
    "moe.dense_mlp_dim=24: expected mlp_dim=16 under a growth_mask, which is"
    " the same for FFNs and experts"
  )
  same = dataclasses.replace(moe, dense_mlp_dim=16)
  assert _model(growth_mask=_mask(), moe=same).dense_mlp_dim == 16


def test_layers_without_experts_are_as_wide_as_an_expert_unless_said():
  moe = MoeConfig(layers="every_second")
  assert _model().dense_mlp_dim == 16
  assert _model(moe=MoeConfig()).dense_mlp_dim == 16
  assert _model(moe=moe).dense_mlp_dim == 16
  wide = dataclasses.replace(moe, dense_mlp_dim=24)
  assert _model(moe=wide).dense_mlp_dim == 24
  listed = MoeConfig(layers=(1,), dense_mlp_dim=16)
  assert _model(moe=moe).spelled_out() == _model(moe=listed)
  assert _model(moe=wide).spelled_out() != _model(moe=listed)


def test_a_growth_mask_comes_back_from_a_header_and_can_be_hashed():
  model = _model(growth_mask=_mask(value=0.25, new_layers=(1,)))
  header = json.loads(json.dumps(config.to_dict(model)))
  found = config.build(ModelConfig, header)
  assert found == model and hash(found) == hash(model)
  del header["growth_mask"]  # of a MODEL of before there were any
  assert config.build(ModelConfig, header) == _model()


def test_query_heads_a_group():
  assert _model(num_heads=6, num_kv_heads=2).queries_per_kv == 3


@pytest.mark.parametrize(
  ("fields", "sums_to_one"),
  [
    (dict(renormalise=False), True),
    (dict(), True),
    (dict(gate_scale=2.0), False),
    (dict(router_order="softmax_then_topk"), True),
    (dict(router_order="softmax_then_topk", renormalise=False), False),
    (dict(router_order="sigmoid"), True),
    (dict(router_order="sigmoid", renormalise=False), False),
    (EXPERT_CHOICE, False),
  ],
)
def test_gates_sum_to_one(fields, sums_to_one):
  assert MoeConfig(**fields).gates_sum_to_one == sums_to_one


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (dict(remat="full", scan_layers=False, compute_dtype="float32"), []),
    (dict(moe=MoeConfig(capacity_factor=2.0, use_routing_kernel=False)), []),
    (
      dict(num_layers=3, moe=MoeConfig(top_k=1, block_size=8)),
      [("num_layers", 3, 2), ("moe.top_k", 1, 2)],
    ),
    (dict(moe=None), [("moe", None, MoeConfig())]),
  ],
)
def test_differences_are_of_architecture(
  fields: dict[str, Any], expected: list[tuple[str, Any, Any]]
):
  one = _model(**dict(moe=MoeConfig()) | fields)
  assert differences(one, _model(moe=MoeConfig())) == expected
