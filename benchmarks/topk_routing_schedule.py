"""A routing, forward or with its gradient, by a TPU's schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax.kernels.topk_routing.api import Backend
from aquila_jax.kernels.topk_routing.rule import Gradients, RoutingRule
from aquila_jax.kernels.topk_routing.shapes import Workload
from aquila_jax.planning.tpu_schedule import Clock, Schedule

TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2")


def functions(
  backend: Backend, work: Workload
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """All outputs of logits; and of logits and gradients, with theirs."""
  rule = RoutingRule(top_k=work.top_k)

  def with_residuals(logits):
    return backend.forward(logits, rule, bias=None, valid=None, num_rows=1)

  def forward(logits):
    return with_residuals(logits)[0]

  def both(logits, grads):
    routed, residuals = with_residuals(logits)
    return routed, backend.backward(residuals, grads, rule)

  return forward, both


def measure(
  clock: Clock,
  backend: Backend,
  work: Workload,
  *,
  num_tokens: int,
  backward: bool,
) -> Schedule:
  """By the schedule, of all outputs, or of these and the gradient of logits."""
  forward, both = functions(backend, work)

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
