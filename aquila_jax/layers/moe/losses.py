"""Losses and load of one layer, over tokens that are not padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core.types import RoutingStats
from aquila_jax.layers.moe.dispatch import Meetings
from aquila_jax.layers.moe.router import Affinity


def routing_stats(
  affinity: Affinity,
  probability: Float[Array, "M E"],
  *,
  meetings: Meetings,
  num_rows: int,
  groups: Float[Array, "M I"] | None = None,
) -> RoutingStats:
  """What the layer says of its routing.

  With f_i the share of all assignments that expert i gets, and P_i the mean of
  p_i over tokens, the balance loss is E sum_i f_i P_i (Switch Transformer,
  arXiv 2101.03961, eq. 4, with f over all A choices): 1 when balanced. The
  product is taken where the batch is known that f is of (training/balance.py).
  `sequence_balance` is that of each of the B rows (DeepSeek-V3, arXiv
  2412.19437, eqs. 17-20), mean over rows by their tokens.

    z_loss = mean logsumexp(x W)^2         (ST-MoE, arXiv 2202.08906, eq. 5)
    entropy = mean of -sum_i p_i log p_i

  f counts what was chosen, whether or not a slot was found, and carries no
  gradient.

  Args:
    affinity: of the router.
    probability: p, of the router's order.
    meetings: of the dispatch.
    num_rows: B; M tokens are as many rows of T.
    groups: 1 where a token is of a group, for the load of each.

  Returns:
    The layer's statistics.
  """
  dtype = affinity.logits.dtype
  valid = affinity.valid.astype(dtype)
  tokens = jnp.sum(valid.reshape(num_rows, -1), axis=1)  # (B,)
  num_tokens = jnp.maximum(jnp.sum(tokens), 1)

  def mean(values: Float[Array, "M"]) -> Float[Array, ""]:
    return jnp.sum(values * valid) / num_tokens

  def by_row(values: Float[Array, "M E"]) -> Float[Array, "B E"]:
    return jnp.sum(values.reshape(num_rows, -1, values.shape[-1]), axis=1)

  assigned = by_row(meetings.assigned.astype(dtype))
  summed = by_row(probability * valid[:, None])
  row_load = assigned / jnp.maximum(_total(assigned), 1)
  rows = jnp.sum(row_load * summed, axis=-1)  # tokens of the row * sum f P
  load = jnp.sum(assigned, axis=0)
  num_assigned = jnp.maximum(_total(load), 1)
  group_load = None
  if groups is not None:
    met = meetings.assigned.astype(dtype)
    group_load = jnp.einsum("MI,ME->IE", groups.astype(dtype), met)
    group_load = jax.lax.stop_gradient(group_load) / num_assigned[None]
  z = jax.nn.logsumexp(affinity.plain, axis=-1)
  still = jax.lax.stop_gradient(probability)
  return RoutingStats(
    load=load / num_assigned,
    probability=jnp.sum(summed, axis=0) / num_tokens,
    sequence_balance=assigned.shape[-1] * jnp.sum(rows) / num_tokens,
    z_loss=mean(jnp.square(z)),
    entropy=mean(-jnp.sum(jax.scipy.special.xlogy(still, still), axis=-1)),
    top_gate=mean(jax.lax.stop_gradient(meetings.top_gate)),
    dropped=meetings.dropped,
    group_load=group_load,
  )


def _total(counts: Float[Array, "*B E"]) -> Float[Array, "*B 1"]:
  return jnp.sum(counts, axis=-1, keepdims=True)
