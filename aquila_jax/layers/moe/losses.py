"""Balance loss, router z-loss and load, over tokens that are not padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from aquila_jax.core.types import RoutingStats
from aquila_jax.layers.moe.router import Routing


def routing_stats(
  routing: Routing, *, kept: Bool[Array, "M A"]
) -> RoutingStats:
  """The layer's losses and load.

  With p = softmax(logits), f_i = (assignments to i) / (A M) and P_i = mean p_i:
  balance = E sum_i f_i P_i (Switch Transformer, arXiv 2101.03961, eq. 4, with f
  over all A choices), which is 1 when balanced; z = mean logsumexp(logits)^2
  (ST-MoE, arXiv 2202.08906, eq. 5). f counts what the router chose, dropped or
  not, and carries no gradient; M counts valid tokens only.

  Args:
    routing: the router's decision.
    kept: which assignments found a slot; padding's value does not matter.

  Returns:
    The layer's RoutingStats.
  """
  num_experts = routing.logits.shape[-1]
  dtype = routing.logits.dtype
  valid = routing.valid.astype(dtype)
  num_valid = jnp.maximum(jnp.sum(valid), 1)
  num_assigned = num_valid * routing.experts.shape[-1]

  chosen = jax.nn.one_hot(routing.experts, num_experts, dtype=dtype)
  load = jnp.sum(chosen * valid[:, None, None], axis=(0, 1)) / num_assigned
  probability = jax.nn.softmax(routing.logits, axis=-1) * valid[:, None]
  mean_probability = jnp.sum(probability, axis=0) / num_valid
  z = jax.nn.logsumexp(routing.logits, axis=-1)
  lost = valid[:, None] * (1 - kept.astype(dtype))
  return RoutingStats(
    balance_loss=num_experts
    * jnp.sum(jax.lax.stop_gradient(load) * mean_probability),
    z_loss=jnp.sum(jnp.square(z) * valid) / num_valid,
    load=load,
    dropped=jnp.sum(lost) / num_assigned,
  )
