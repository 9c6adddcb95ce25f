"""Top-k routing: from router logits to everything that an MoE layer needs."""

from __future__ import annotations

import functools
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from aquila_jax.kernels.target import is_whole, say_once, target
from aquila_jax.kernels.topk_routing import pallas_gpu, pallas_tpu, reference
from aquila_jax.kernels.topk_routing.rule import (
  Gradients,
  Residuals,
  Routed,
  RoutingRule,
)

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


@runtime_checkable
class Backend(Protocol):
  """What computes a routing, and the gradient of its logits."""

  def unsupported(
    self, rule: RoutingRule, dtype: jnp.dtype, num_experts: int
  ) -> str | None:
    """Why it can't do so here; None where it can."""
    ...

  def forward(
    self,
    logits: Float[Array, "M E"],
    rule: RoutingRule,
    *,
    bias: Float[Array, "E"] | None,
    valid: Bool[Array, "M"] | None,
    num_rows: int,
  ) -> tuple[Routed, Residuals]:
    """See `topk_routing`."""
    ...

  def backward(
    self, residuals: Residuals, grads: Gradients, rule: RoutingRule
  ) -> Float[Array, "M E"]:
    """The gradient of the logits; the formulas are in reference.py."""
    ...


_BACKENDS: dict[str, Backend] = {
  "xla": reference.Xla(),
  "pallas_tpu": pallas_tpu.PallasTpu(),
  "pallas_gpu": pallas_gpu.PallasGpu(),
}


def topk_routing(
  logits: Float[Array, "M E"],
  rule: RoutingRule,
  *,
  bias: Float[Array, "E"] | None = None,
  valid: Bool[Array, "M"] | None = None,
  num_rows: int = 1,
  implementation: Implementation | Backend | None = None,
) -> Routed:
  """The experts of every token, their gates, and each assignment's place.

  A token goes to the `top_k` experts of the largest rank. Ranks are the logits,
  with which every order's scores rise; with a bias, or a limit to groups, they
  are the scores plus the bias (loss-free balancing, arXiv 2408.15664, eq. 3),
  while gates are of the scores alone. Orders and gates: scoring.py. Groups
  (DeepSeek-V2, arXiv 2405.04434, section 2.2.2; V3): experts come from the
  `top_groups` best groups of neighbours, by the largest rank in a group or by
  the sum of its two largest.

  Ranks are ordered as by `jax.lax.top_k`, ties to the lowest expert: from NaN
  through infinity, 0.0, -0.0 and -infinity to NaN with its sign set. Whatever a
  token's logits are, its experts are distinct and below E. Where they are not
  finite, its gates and its part of the sums may not be, and other tokens'
  outputs are not touched.

  An assignment's position is the number of earlier tokens with the same expert:
  with the counts it says where the assignment goes in a grouping by expert, and
  whether it lies within a capacity.

  Computed in float32 at least. Gradients are of the logits alone, from gates,
  `probability` and `z`; the choice has none, nor has `entropy`. vmap, remat and
  shard_map work; inside the latter positions and sums are those of the shard.

  Args:
    logits: of the router.
    rule: how tokens choose.
    bias: added to the scores for the choice, without a gradient.
    valid: False for padding; None is all.
    num_rows: B; the M tokens are as many rows of M / B.
    implementation: None chooses by platform. A backend itself, and not its
      name, is for what the platform does not tell: tests, and compiling for a
      device that is not there.

  Returns:
    The routing.

  Raises:
    ValueError: where top_k or num_rows does not fit the logits.
    NotImplementedError: where `implementation` cannot do what was asked for.
  """
  num_tokens, num_experts = logits.shape
  if not 1 <= rule.top_k <= num_experts:
    raise ValueError(
      f"top_k={rule.top_k}: need 1 <= top_k <= {num_experts} experts"
    )
  if num_rows < 1 or num_tokens % num_rows:
    raise ValueError(f"num_rows={num_rows}: need a divisor of {num_tokens}")
  backend = _backend(implementation, rule, logits)
  return _routed(backend, rule, num_rows, logits, bias, valid)


def _backend(
  implementation: Implementation | Backend | None,
  rule: RoutingRule,
  logits: Float[Array, "M E"],
) -> Backend:
  asked = (rule, logits.dtype, logits.shape[1])
  name = "backend"
  if implementation is None:
    name = platform_default()
    reason = _BACKENDS[name].unsupported(*asked)
    if reason:
      say_once(f"topk_routing: xla in the place of {name}: {reason}")
      return _BACKENDS["xla"]
    return _BACKENDS[name]
  if isinstance(implementation, str):
    name = implementation
    if name not in _BACKENDS:
      raise NotImplementedError(
        f"implementation={name!r}; there are {', '.join(_BACKENDS)}"
      )
    implementation = _BACKENDS[name]
  reason = implementation.unsupported(*asked)
  if reason:
    raise NotImplementedError(f"implementation={name!r}: no {reason}")
  return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _routed(backend, rule, num_rows, logits, bias, valid) -> Routed:
  routed, _ = backend.forward(
    logits, rule, bias=bias, valid=valid, num_rows=num_rows
  )
  return routed


def _routed_forward(backend, rule, num_rows, logits, bias, valid):
  return backend.forward(
    logits, rule, bias=bias, valid=valid, num_rows=num_rows
  )


def _routed_backward(backend, rule, num_rows, residuals, grads: Routed):
  del num_rows
  wanted = Gradients(
    gates=grads.gates, probability=grads.probability, z=grads.z
  )
  return backend.backward(residuals, wanted, rule), None, None


_routed.defvjp(_routed_forward, _routed_backward)


def platform_default() -> Implementation:
  """The backend of what is compiled for; logged once.

  A kernel has to have the arrays whole, as on one device or in shard_map;
  elsewhere the compiler divides the operations of the reference. pallas_gpu is
  by name only: it compiles for GPUs (`make gpu`), but has not run on one yet.
  """
  platform, whole = target().platform, is_whole()
  name: Implementation = "pallas_tpu" if platform == "tpu" and whole else "xla"
  say_once(f"topk_routing: {name} on {platform}{'' if whole else 's'}")
  return name
