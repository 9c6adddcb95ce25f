"""The GPU kernels' bodies, interpreted, against loops; and what they lower to.

What Triton makes of them is checked by `make gpu`.
"""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from aquila_jax.kernels.topk_routing import api
from aquila_jax.kernels.topk_routing.pallas_gpu import (
  GpuBlocks,
  PallasGpu,
  default_blocks,
)
from aquila_jax.kernels.topk_routing.reference import Xla
from aquila_jax.kernels.topk_routing.rule import RoutingRule
from tests.kernels.topk_routing.contract import (
  ANY_LOGITS,
  REFUSED,
  Case,
  TopkRoutingContract,
  check_choice,
  check_refused,
)

HERE = PallasGpu(device_kind="interpreted", interpret=True)
FAST = {"xla_backend_optimization_level": 0}


class TestPallasGpu(TopkRoutingContract):
  backend = HERE
  compiler_options = FAST

  @pytest.mark.parametrize(
    "case",
    [
      # Programs that tokens do not fill; padding.
      Case(num_experts=8, top_k=2, num_tokens=200, has_valid=True),
      Case(num_experts=7, top_k=3, order="softmax_then_topk", has_bias=True),
      Case(num_experts=12, top_k=4, dtype=jnp.bfloat16, order="sigmoid"),
      Case(num_experts=60, top_k=4, has_bias=True, has_valid=True),
      Case(num_experts=256, top_k=8, num_tokens=20),
      Case(num_experts=512, top_k=1, num_tokens=5, order="softmax_then_topk"),
      # More chosen than are unrolled, and all.
      Case(num_experts=12, top_k=12, order="sigmoid", has_valid=True),
      # Rows that end within a program.
      Case(
        num_experts=16,
        top_k=2,
        num_tokens=400,
        num_rows=4,
        order="softmax_then_topk",
        renormalise=False,
        gate_scale=0.5,
        has_bias=True,
        has_valid=True,
      ),
      Case(num_experts=2, top_k=1, num_tokens=3, num_rows=3),
    ],
    ids=str,
  )
  def test_outputs_and_gradient(self, case):
    self.check(case)


class TestGroupsOfTokens(TopkRoutingContract):
  backend = PallasGpu(
    device_kind="interpreted",
    interpret=True,
    blocks=GpuBlocks(tokens=2, groups=4),
  )
  compiler_options = FAST

  def test_outputs_and_gradient(self):
    self.check(
      Case(num_experts=6, top_k=2, num_tokens=38, num_rows=2, has_valid=True)
    )


_choose = jax.jit(
  lambda x: api.topk_routing(x, RoutingRule(top_k=3), implementation=HERE),
  compiler_options=FAST,
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(logits=ANY_LOGITS)
def test_the_choice_is_that_of_top_k_whatever_the_logits(logits):
  check_choice(_choose(jnp.asarray(logits)), logits)


def _loss(logits, backend):
  found = api.topk_routing(logits, RoutingRule(top_k=2), implementation=backend)
  return jnp.sum(found.gates[:, 0]) + jnp.sum(found.probability**2) + found.z


def test_vmap_remat_and_shard_map():
  """Each gives what the reference gives for each batch, and its gradient."""
  logits = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32
  )
  plain = jax.value_and_grad(lambda x: _loss(x, Xla()))
  expected = jax.jit(jax.vmap(plain))(logits)
  one = jax.value_and_grad(jax.checkpoint(lambda x: _loss(x, HERE)))
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
  sharded = jax.shard_map(
    lambda x: jax.tree.map(lambda y: y[None], one(x[0])),
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P("data"),
    # The interpreter does not type a body's constants.
    check_vma=False,
  )
  for function in (jax.vmap(one), sharded):
    found = jax.jit(function, compiler_options=FAST)(logits)
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rule", "dtype", "num_experts", "reason"), REFUSED)
def test_what_it_cannot_do(rule, dtype, num_experts, reason):
  check_refused(HERE, rule, dtype, num_experts, reason)


def test_it_never_runs_where_there_is_no_gpu():
  with pytest.raises(NotImplementedError) as caught:
    api.topk_routing(
      jnp.zeros((4, 8)), RoutingRule(top_k=2), implementation="pallas_gpu"
    )
  assert str(caught.value) == ("implementation='pallas_gpu': no GPU, but cpu")


@pytest.mark.parametrize("num_experts", [7, 64, 384, 512])
def test_it_lowers_for_gpus_with_its_gradient(num_experts):
  backend = PallasGpu(device_kind="elsewhere")
  exported = jax.export.export(
    jax.jit(jax.value_and_grad(lambda x: _loss(x, backend))),
    platforms=["cuda"],
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    ],
  )(jax.ShapeDtypeStruct((100, num_experts), jnp.float32))
  text = exported.mlir_module()
  assert text.count("custom_call @__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize(
  ("num_experts", "tokens", "groups"),
  [(2, 32, 1), (8, 32, 1), (60, 4, 2), (256, 1, 8), (384, 1, 8), (512, 1, 8)],
)
def test_a_thread_has_few_logits(num_experts, tokens, groups):
  expected = GpuBlocks(tokens=tokens, groups=groups, warps=1)
  assert default_blocks(num_experts) == expected
