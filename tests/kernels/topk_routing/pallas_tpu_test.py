"""The TPU kernels' bodies, interpreted, against loops.

What the chip's compiler makes of them is checked by `make tpu`, as are the
larger shapes, which take long to interpret.
"""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from aquila_jax.kernels.topk_routing import api, tuning
from aquila_jax.kernels.topk_routing.grid import Grid
from aquila_jax.kernels.topk_routing.pallas_tpu import PallasTpu
from aquila_jax.kernels.topk_routing.rule import RoutingRule
from aquila_jax.kernels.topk_routing.tuning import Blocks
from tests.kernels.topk_routing.contract import (
  ANY_LOGITS,
  REFUSED,
  Case,
  TopkRoutingContract,
  check_choice,
  check_refused,
)

# One core, and two.
ONE = PallasTpu(device_kind="TPU v6 lite", interpret=True)
TWO = PallasTpu(device_kind="TPU v5", interpret=True, blocks=Blocks(tokens=128))
FAST = {"xla_backend_optimization_level": 0}


class TestOneCore(TopkRoutingContract):
  backend = ONE
  compiler_options = FAST

  @pytest.mark.parametrize(
    "case",
    [
      # Tokens that fill no tile; padding.
      Case(num_experts=8, top_k=2, num_tokens=200, has_valid=True),
      Case(num_experts=7, top_k=3, order="softmax_then_topk", has_bias=True),
      Case(num_experts=12, top_k=4, dtype=jnp.bfloat16, order="sigmoid"),
      # More than 64 experts: sets are compared first. More than 8 chosen.
      Case(num_experts=76, top_k=2, num_tokens=8),
      Case(num_experts=12, top_k=10, order="sigmoid", has_valid=True),
    ],
    ids=str,
  )
  def test_outputs_and_gradient(self, case):
    self.check(case)


class TestTwoCores(TopkRoutingContract):
  backend = TWO
  compiler_options = FAST

  @pytest.mark.parametrize(
    "case",
    [
      # A row on two cores; rows of two tiles; rows that fill no tile.
      Case(num_experts=8, top_k=2, num_tokens=512),
      Case(num_experts=8, top_k=2, num_tokens=512, num_rows=2),
      Case(
        num_experts=8,
        top_k=2,
        num_tokens=400,
        num_rows=4,
        order="softmax_then_topk",
        renormalise=False,
        gate_scale=0.5,
        has_valid=True,
      ),
    ],
    ids=str,
  )
  def test_outputs_and_gradient(self, case):
    self.check(case)


class TestFewExperts(TopkRoutingContract):
  """Rows of whole vectors of 1,024 tokens: the kernels of tpu_few.py."""

  backend = ONE
  compiler_options = FAST

  @pytest.mark.parametrize(
    "case",
    [
      Case(
        num_experts=7,
        top_k=3,
        num_tokens=1024,
        order="sigmoid",
        gate_scale=2.5,
        has_bias=True,
        has_valid=True,
      ),
      Case(
        num_experts=9,
        top_k=2,
        num_tokens=1024,
        dtype=jnp.bfloat16,
        order="softmax_then_topk",
        renormalise=False,
        has_bias=True,
      ),
    ],
    ids=str,
  )
  def test_outputs_and_gradient(self, case):
    self.check(case)


class TestFewExpertsOnTwoCores(TopkRoutingContract):
  backend = PallasTpu(
    device_kind="TPU v5", interpret=True, blocks=Blocks(tokens=1024)
  )
  compiler_options = FAST

  def test_outputs_and_gradient(self):
    self.check(
      Case(num_experts=8, top_k=2, num_tokens=4096, num_rows=2, has_valid=True)
    )


_choose = jax.jit(
  lambda x: api.topk_routing(x, RoutingRule(top_k=3), implementation=ONE),
  compiler_options=FAST,
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(logits=ANY_LOGITS)
def test_the_choice_is_that_of_top_k_whatever_the_logits(logits):
  check_choice(_choose(jnp.asarray(logits)), logits)


def _loss(logits):
  found = api.topk_routing(logits, RoutingRule(top_k=2), implementation=ONE)
  return jnp.sum(found.gates[:, 0]) + jnp.sum(found.probability**2) + found.z


def test_vmap_remat_and_shard_map():
  """Each gives what a call for each batch gives, and its gradient."""
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)))
  logits = logits.astype(jnp.float32)
  one = jax.jit(jax.value_and_grad(_loss), compiler_options=FAST)
  pairs = [one(batch) for batch in logits]
  expected = [jnp.stack(values) for values in zip(*pairs, strict=True)]

  many = jax.jit(
    jax.vmap(jax.value_and_grad(jax.checkpoint(_loss))), compiler_options=FAST
  )
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
  sharded = jax.jit(
    jax.shard_map(
      lambda x: jax.tree.map(
        lambda y: y[None], jax.value_and_grad(_loss)(x[0])
      ),
      mesh=mesh,
      in_specs=P("data"),
      out_specs=P("data"),
      # The interpreter does not type a body's constants.
      check_vma=False,
    ),
    compiler_options=FAST,
  )
  for found in (many(logits), sharded(logits)):
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("rule", "dtype", "num_experts", "reason"), REFUSED)
def test_what_it_cannot_do(rule, dtype, num_experts, reason):
  check_refused(ONE, rule, dtype, num_experts, reason)


def test_old_chips_are_named():
  backend = PallasTpu(device_kind="TPU v4")
  with pytest.raises(NotImplementedError, match="no kernel for TPU v4$"):
    api.topk_routing(
      jnp.zeros((4, 8)), RoutingRule(top_k=2), implementation=backend
    )


def test_what_the_kernel_cannot_do_the_reference_does(monkeypatch):
  monkeypatch.setattr(api, "platform_default", lambda: "pallas_tpu")
  monkeypatch.setitem(api._BACKENDS, "pallas_tpu", ONE)
  rule = RoutingRule(top_k=2, num_groups=4, top_groups=2)
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))

  def calls_kernel(rule):
    call = lambda x: api.topk_routing(x, rule)  # noqa: E731
    return "pallas_call" in str(jax.make_jaxpr(call)(logits.astype("float32")))

  assert not calls_kernel(rule)
  assert calls_kernel(RoutingRule(top_k=2))


@pytest.mark.parametrize(
  ("row_tokens", "num_rows", "num_cores", "expected"),
  [
    # tokens a tile, cores, steps a core, steps a piece
    (8192, 1, 2, (512, 2, 8, 8)),
    (8192, 1, 1, (512, 1, 16, 16)),
    # Rows longer than a tile, of which 384 is the largest that divides them.
    (768, 3, 2, (384, 2, 3, 1)),
    (768, 2, 2, (384, 2, 2, 2)),
    # No tile is larger than a core's share.
    (512, 1, 2, (256, 2, 1, 1)),
    # An odd number of tiles stays on one core.
    (100, 3, 2, (128, 1, 3, 1)),
  ],
)
def test_how_tokens_are_cut(row_tokens, num_rows, num_cores, expected):
  grid = Grid.of(row_tokens, num_rows, blocks=Blocks(), num_cores=num_cores)
  found = grid.blocks.tokens, grid.num_cores, grid.steps, grid.steps_per_piece
  assert found == expected


@pytest.mark.parametrize("num_experts", [8, 60, 100, 384, 512])
@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite", "TPU of tomorrow"])
def test_tiles_fit_and_divide_what_is_common(kind, num_experts):
  blocks = tuning.blocks(kind, num_experts=num_experts, top_k=2)
  # The rest of 2^13 tokens would be a tile with next to nothing in it.
  assert 2**13 % blocks.tokens == 0
  assert blocks.tokens * num_experts <= 2**19
