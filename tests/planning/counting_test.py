"""Counts against numbers done by hand, and FLOPs against what is executed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.models import decoder_lm
from aquila_jax.planning import counting
from aquila_jax.planning.counting import PartCount

DENSE = ModelConfig(
  vocab_size=40,
  num_layers=3,
  embed_dim=8,
  mlp_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  context_length=16,
  compute_dtype="float32",
)
MIXTURE = dataclasses.replace(DENSE, moe=MoeConfig(num_experts=4, top_k=2))


def test_dense_parts_by_hand():
  counted = counting.count(DENSE, sequence_length=16)
  # Query and out: 8 * 4 * 6 = 192 each; key and value: 8 * 2 * 6 = 96 each;
  # biases: 24 + 12 + 12 = 48. FFN: 3 * 8 * 12 = 288. All in 3 layers.
  kernels = 2 * 192 + 2 * 96
  assert counted.parts == {
    "embedding": PartCount(parameters=320, active=320),
    "attention": PartCount(
      parameters=3 * (kernels + 48),
      active=3 * (kernels + 48),
      forward_flops=2 * 3 * kernels,
    ),
    # 4 * L * N * H * T
    "attention scores": PartCount(forward_flops=4 * 3 * 4 * 6 * 16),
    "ffn": PartCount(
      parameters=3 * 288, active=3 * 288, forward_flops=2 * 3 * 288
    ),
    "norms": PartCount(parameters=7 * 8, active=7 * 8),
    "lm_head": PartCount(parameters=320, active=320, forward_flops=640),
  }
  assert counted.total.parameters == 320 + 3 * 624 + 3 * 288 + 56 + 320


def test_token_meets_top_k_of_the_experts_and_the_whole_router():
  parts = counting.count(MIXTURE).parts
  assert "ffn" not in parts
  assert parts["experts"] == PartCount(
    parameters=4 * 3 * 288, active=2 * 3 * 288, forward_flops=2 * 2 * 3 * 288
  )
  assert parts["router"] == PartCount(
    parameters=3 * 32, active=3 * 32, forward_flops=2 * 3 * 32
  )


def test_layers_without_experts_have_an_ffn_that_every_token_meets():
  moe = MoeConfig(num_experts=4, top_k=2, layers=(0, 2))
  mixed = counting.count(dataclasses.replace(DENSE, moe=moe))
  # Of 3 layers two with 4 experts of 3 * 8 * 12 = 288, of which 2 are met.
  assert mixed.parts["experts"] == PartCount(
    parameters=2 * 4 * 288, active=2 * 2 * 288, forward_flops=2 * 2 * 2 * 288
  )
  assert mixed.parts["ffn"] == PartCount(
    parameters=288, active=288, forward_flops=2 * 288
  )
  assert mixed.parts["router"].parameters == 2 * 32
  dense = counting.count(DENSE)
  for part in ("attention", "attention scores", "norms", "lm_head"):
    assert mixed.parts[part] == dense.parts[part]
  rest = dense.total.parameters - 3 * 288
  assert mixed.total.parameters == rest + (2 * 4 + 1) * 288 + 2 * 32
  assert mixed.total.active == rest + (2 * 2 + 1) * 288 + 2 * 32


def test_layers_without_experts_count_their_own_width():
  moe = MoeConfig(num_experts=4, top_k=2, layers=(0, 2), dense_mlp_dim=20)
  parts = counting.count(dataclasses.replace(DENSE, moe=moe)).parts
  # One layer of 3 * 8 * 20; experts as before.
  assert parts["ffn"] == PartCount(
    parameters=480, active=480, forward_flops=2 * 480
  )
  assert parts["experts"].parameters == 2 * 4 * 288


def test_shared_expert_is_met_by_every_token():
  moe = MoeConfig(num_experts=4, top_k=2, shared_expert_dim=10)
  parts = counting.count(dataclasses.replace(DENSE, moe=moe)).parts
  # Three matrices 8 x 10 and a gate 8 x 1, in 3 layers.
  size = 3 * (3 * 80 + 8)
  assert parts["shared expert"] == PartCount(
    parameters=size, active=size, forward_flops=2 * size
  )
  ungated = dataclasses.replace(moe, shared_expert_gate=False)
  parts = counting.count(dataclasses.replace(DENSE, moe=ungated)).parts
  assert parts["shared expert"].parameters == 3 * 240
  assert "shared expert" not in counting.count(MIXTURE).parts


def test_norms_of_heads_and_the_output_bias_by_hand():
  parts = counting.count(DENSE).parts
  options = dataclasses.replace(DENSE, qk_norm=True, out_bias=True)
  found = counting.count(options).parts
  # Two scales of 6, and a bias of 8, in 3 layers; none is a matrix.
  added = found["norms"].parameters - parts["norms"].parameters
  added += found["attention"].parameters - parts["attention"].parameters
  assert added == 3 * (2 * 6 + 8)
  assert counting.count(options).total.forward_flops == (
    counting.count(DENSE).total.forward_flops
  )


def test_tied_table_is_held_once_and_multiplied_once():
  tied = dataclasses.replace(DENSE, tied_embeddings=True)
  untied_total = counting.count(DENSE).total
  total = counting.count(tied).total
  assert untied_total.parameters - total.parameters == 320
  assert total.forward_flops == untied_total.forward_flops


EVERYTHING = dataclasses.replace(
  DENSE,
  qk_norm=True,
  out_bias=True,
  moe=MoeConfig(num_experts=4, top_k=2, shared_expert_dim=10),
)


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("config", [DENSE, MIXTURE, EVERYTHING])
def test_counts_the_parameters_that_init_makes(config):
  params = decoder_lm.init_params(config, key=jax.random.key(0))
  held = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert counting.count(config).total.parameters == held


def test_aquila_8x16b():
  # The paper: 104.7B parameters, 29.2B active. Nothing here is allocated.
  config = ModelConfig(
    vocab_size=151851,
    num_layers=40,
    embed_dim=5120,
    mlp_dim=20480,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    moe=MoeConfig(num_experts=8, top_k=2),
  )
  total = counting.count(config).total
  # Embedding and head 2 V D; a layer: q and out 2 D N H, k and v 2 D K H,
  # biases (N + 2 K) H, router D E, norms 2 D, experts 8 * 3 D F; a last norm.
  layer = 2 * 5120 * 5120 + 2 * 5120 * 1024 + 7168 + 5120 * 8 + 2 * 5120
  experts = 8 * 3 * 5120 * 20480
  assert total.parameters == 2 * 151851 * 5120 + 40 * (layer + experts) + 5120
  assert total.active == total.parameters - 40 * experts * 6 // 8
  assert counting.in_words(total.parameters) == "104.7B"
  assert counting.in_words(total.active) == "29.2B"


def _forward(config: ModelConfig, *, num_tokens: int):
  """The forward pass of one row, and abstract arguments for it."""
  row = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

  def forward(params, tokens, positions, segments):
    variables = {"params": params}
    out: Any = decoder_lm.DecoderLM(config).apply(
      variables, tokens, positions=positions, segments=segments
    )
    return out.logits

  return forward, (decoder_lm.abstract_params(config), row, row, row)


def _product_flops(jaxpr) -> int:
  """2 * M * N * K of every dot in a jaxpr, loops multiplied out."""
  flops = 0
  for equation in jaxpr.eqns:
    times = equation.params.get("length", 1)
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      depth = math.prod(shape[axis] for axis in contracted)
      flops += 2 * equation.outvars[0].aval.size * depth
    for parameter in equation.params.values():
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        flops += times * _product_flops(inner)
  return flops


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_tokens", [16, 48])
def test_forward_flops_are_those_of_the_products_traced(tied, num_tokens):
  config = dataclasses.replace(DENSE, tied_embeddings=tied)
  forward, arguments = _forward(config, num_tokens=num_tokens)
  traced = _product_flops(jax.make_jaxpr(forward)(*arguments).jaxpr)
  counted = counting.count(config, sequence_length=num_tokens)
  assert traced == num_tokens * counted.total.forward_flops


def test_forward_flops_are_what_xla_counts_up_to_elementwise_work():
  # One layer, since XLA counts the body of a loop once.
  sizes = dict(embed_dim=64, mlp_dim=192, num_heads=4, head_dim=16)
  config = dataclasses.replace(DENSE, num_layers=1, vocab_size=512, **sizes)
  num_tokens = 32
  forward, arguments = _forward(config, num_tokens=num_tokens)
  analysis = jax.jit(forward).lower(*arguments).compile().cost_analysis()
  assert analysis is not None
  counted = counting.count(config, sequence_length=num_tokens)
  products = num_tokens * counted.total.forward_flops
  # Beside the products, a token: 3 norms of at most 6 operations a width of
  # 64; rotation, scale and bias of 8 heads of 16, at most 12 each; mask and
  # softmax of 4 heads over 32 keys, at most 12 each; silu, product, 192 wide,
  # at most 8; two residual sums.
  elementwise = 3 * 6 * 64 + 12 * 8 * 16 + 12 * 4 * 32 + 8 * 192 + 2 * 64
  assert products <= analysis["flops"] <= products + num_tokens * elementwise


def test_training_is_three_forwards_at_the_given_length():
  counted = counting.count(DENSE, sequence_length=10)
  assert counting.train_flops_per_token(DENSE, 10) == (
    3 * counted.total.forward_flops
  )
  grown = counting.count(DENSE, sequence_length=20)
  scores = "attention scores"
  assert grown.parts[scores].forward_flops == (
    2 * counted.parts[scores].forward_flops
  )


def test_the_pass_for_the_load_is_a_forward_without_the_head():
  parts = counting.count(MIXTURE, sequence_length=10).parts
  body = sum(p.forward_flops for n, p in parts.items() if n != "lm_head")
  head = parts["lm_head"].forward_flops
  found = counting.train_flops_per_token(MIXTURE, 10, has_load_pass=True)
  assert head > 0 and found == 4 * body + 3 * head


def test_a_selection_bias_is_the_routers_and_takes_no_flops():
  moe = MoeConfig(num_experts=4, top_k=2, selection_bias=True)
  with_bias = dataclasses.replace(MIXTURE, moe=moe)
  plain, found = (
    counting.count(config).parts["router"] for config in (MIXTURE, with_bias)
  )
  more = 4 * MIXTURE.num_layers
  assert found == plain + PartCount(parameters=more, active=more)


def test_table():
  config = dataclasses.replace(
    MIXTURE, num_layers=1, vocab_size=1000, context_length=4
  )
  assert counting.format_count(counting.count(config)) == (
    "part              parameters  active  forward FLOPs/token\n"
    "---------------------------------------------------------\n"
    "embedding              8,000   8,000                    0\n"
    "attention                624     624                1,152\n"
    "attention scores           0       0                  384\n"
    "experts                1,152     576                1,152\n"
    "router                    32      32                   64\n"
    "norms                     24      24                    0\n"
    "lm_head                8,000   8,000               16,000\n"
    "---------------------------------------------------------\n"
    "total                 17,832  17,256               18,752\n"
    "\n"
    "17.8K parameters, 17.3K active; 56.3K training FLOPs a token (forward"
    " and backward, T=4)"
  )


@pytest.mark.parametrize(
  ("number", "words"),
  [
    (999, "999"),
    (1000, "1.0K"),
    (12_345, "12.3K"),
    (999_949, "999.9K"),
    (999_960, "1.0M"),
    (104_737_172_480, "104.7B"),
    (3.6e12, "3.6T"),
  ],
)
def test_numbers_in_words(number, words):
  assert counting.in_words(number) == words
