"""The routing kernels through a GPU's compiler; `make gpu`, no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from aquila_jax.kernels.topk_routing import api
from aquila_jax.kernels.topk_routing.pallas_gpu import PallasGpu
from aquila_jax.kernels.topk_routing.rule import RoutingRule
from aquila_jax.kernels.topk_routing.shapes import NAMED
from aquila_jax.planning.gpu_code import KernelCode, compile_kernels

CAPABILITIES = {"A100": 80, "H100": 90, "B200": 100}
# That a multiprocessor still has three programs of four warps.
_MOST_REGISTERS = 168
# Of any of these GPUs; more has to be asked for.
_MOST_SHARED = 48 * 2**10

SHAPES: Any = [
  # num_experts, top_k, tokens, dtype, order, bias, valid
  *(
    (work.num_experts, work.top_k, 8192, jnp.float32, order, False, False)
    for work in NAMED
    for order in ("topk_then_softmax", "sigmoid")
  ),
  (7, 3, 300, jnp.float32, "sigmoid", True, True),
  (60, 4, 1000, jnp.bfloat16, "softmax_then_topk", True, False),
  (512, 1, 512, jnp.float32, "topk_then_softmax", False, True),
  (12, 12, 2048, jnp.bfloat16, "sigmoid", False, True),
  (72, 20, 600, jnp.float32, "softmax_then_topk", True, True),
  (2, 1, 1, jnp.float32, "topk_then_softmax", False, False),
]


def _kernels(shape: Any, capability: int) -> list[KernelCode]:
  num_experts, top_k, tokens, dtype, order, has_bias, has_valid = shape
  rule = RoutingRule(top_k=top_k, order=order)
  backend = PallasGpu(device_kind="elsewhere")

  def loss(logits, bias, valid):
    found = api.topk_routing(
      logits, rule, bias=bias, valid=valid, implementation=backend
    )
    total = jnp.sum(found.gates) + jnp.sum(found.probability**2) + found.z
    return total, found

  return compile_kernels(
    jax.value_and_grad(loss, has_aux=True),
    jax.ShapeDtypeStruct((tokens, num_experts), dtype),
    jax.ShapeDtypeStruct((num_experts,), jnp.float32) if has_bias else None,
    jax.ShapeDtypeStruct((tokens,), jnp.bool_) if has_valid else None,
    capability=capability,
  )


@pytest.mark.parametrize(
  ("capability", "shape"),
  [
    pytest.param(capability, shape, id=f"{name}-{'-'.join(map(str, shape))}")
    for (name, capability), shape in itertools.product(
      CAPABILITIES.items(), SHAPES
    )
  ],
)
def test_everything_stays_in_registers(capability, shape):
  forward, backward = _kernels(shape, capability)
  assert forward.name == "topk_routing"
  assert backward.name == "topk_routing_gradient"
  for code in (forward, backward):
    assert code.spilled_bytes == 0, code
    assert code.registers <= _MOST_REGISTERS, code
    assert code.shared_bytes <= _MOST_SHARED, code
