"""A routing, forward or with its gradient, by a TPU's schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax.kernels.topk_routing.api import Backend
from aquila_jax.kernels.topk_routing.rule import Gradients, RoutingRule
from aquila_jax.kernels.topk_routing.shapes import Workload
from aquila_jax.planning.tpu_schedule import Clock, Schedule

TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2")


def measure(
  clock: Clock,
  backend: Backend,
  work: Workload,
  *,
  num_tokens: int,
  backward: bool,
) -> Schedule:
  """All outputs of a routing, and the gradient of its logits."""
  rule = RoutingRule(top_k=work.top_k)

  def forward(logits):
    routed, _ = backend.forward(logits, rule, bias=None, valid=None, num_rows=1)
    return routed

  def both(logits, grads):
    routed, residuals = backend.forward(
      logits, rule, bias=None, valid=None, num_rows=1
    )
    return routed, backend.backward(residuals, grads, rule)

  def array(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  logits = array(num_tokens, work.num_experts)
  if not backward:
    return clock.measure(forward, logits)
  grads = Gradients(
    gates=array(num_tokens, work.top_k),
    probability=array(1, work.num_experts),
    z=array(),
  )
  return clock.measure(both, logits, grads)
