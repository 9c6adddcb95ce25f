"""Experts that lie on several devices, in shard_map.

Each device has tokens of its own, and some of the experts. By an exchange
(exchanges.py) the rows of tokens go to their experts and back. Where any device
would get more than its buffers hold, all devices take the exact way in its
place: tokens go around the devices once, with the sum of what experts have made
of them, and no buffer can be too small (`_around`).

Nothing is dropped here; what a capacity has dropped is not sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core import errors
from aquila_jax.core.model_config import ExpertExchange, MoeConfig
from aquila_jax.kernels.expert_ffn import api as expert_ffn
from aquila_jax.kernels.target import say_once, target
from aquila_jax.layers.moe import weighted_experts
from aquila_jax.layers.moe.dispatch import Rows, TokenDispatch
from aquila_jax.layers.moe.exchanges import (
  EXCHANGES,
  Exchange,
  Gathered,
  Group,
  Traffic,
  Travelling,
)

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down
# The scope of what is computed where buffers do not suffice.
OVERFLOW = "expert_overflow"
# Tokens, gates and kernels: what a way has gradients of.
_Floats = tuple[jax.Array, jax.Array, Kernels]
_Way = Callable[[_Floats, TokenDispatch, Traffic], jax.Array]


def apply(
  x: Float[Array, "M D"],
  plan: TokenDispatch,
  kernels: Kernels,
  *,
  config: MoeConfig,
  axis: str,
) -> Float[Array, "M D"]:
  """The sum over a token's experts of gate * expert(x), in shard_map.

  Args:
    x: this device's tokens.
    plan: for all experts, as if they were here.
    kernels: of this device's experts: gate and up [X D F], down [X F D].
    config: which exchange, and its buffers.
    axis: of the mesh, that experts are divided over.

  Returns:
    The outputs of this device's tokens.
  """
  group = _group(x, config=config, axis=axis)
  exchange = _chosen(config, group, bytes_per_row=x.shape[1] * x.dtype.itemsize)
  traffic = Traffic.of(plan, group)
  floats = (x, plan.routing.gates, kernels)
  plan = jax.lax.stop_gradient(plan)
  if exchange.always_fits(group):
    return _at_once(exchange, group, floats, plan, traffic)
  everywhere = jax.sharding.get_abstract_mesh().axis_names
  fits = jax.lax.pmin(
    exchange.fits(traffic, group).astype(jnp.int32), everywhere
  )
  return _guarded((exchange, group), floats, (fits > 0, plan, traffic))


def apply_to_same(
  x: Float[Array, "M D"],
  plan: TokenDispatch,
  kernels: Kernels,
  *,
  config: MoeConfig,
  axis: str,
) -> Float[Array, "M D"]:
  """As `apply`, of tokens that are the same on all devices along the axis.

  Each has its experts' part of the sum, and no token travels.
  """
  group = _group(x, config=config, axis=axis)
  served = group.mine(plan.served[None])[0]
  here = Travelling.of(plan).placed(
    served, num_rows=group.most_rows, group=group
  )
  return jax.lax.psum(computed(x, here, kernels), axis)


def _group(x: Float[Array, "M D"], *, config: MoeConfig, axis: str) -> Group:
  return Group(
    axis=axis,
    size=jax.lax.axis_size(axis),
    num_experts=config.num_experts,
    num_tokens=x.shape[0],
    top_k=config.top_k,
    block_size=config.block_size,
    buffer_factor=config.buffer_factor,
  )


def _chosen(config: MoeConfig, group: Group, *, bytes_per_row: int) -> Exchange:
  """By name, or by the bytes that a device sends; logged once."""
  platform = target().platform
  best = "ragged_all_to_all" if platform == "tpu" else "all_to_all"
  name: ExpertExchange = config.exchange or min(
    (best, "all_gather"), key=lambda each: EXCHANGES[each].sent(group)
  )
  if name == "ragged_all_to_all" and platform == "cpu":
    raise errors.UserError(
      f"model.moe.exchange={name!r}: XLA has none for CPUs; expected"
      " 'all_to_all' or 'all_gather'"
    )
  sizes = ", ".join(
    f"{each} {way.sent(group) * bytes_per_row / 1e6:,.3g}"
    for each, way in EXCHANGES.items()
  )
  say_once(
    f"experts over {group.axis}={group.size}: {name}; MB that a device sends in"
    f" a layer's forward pass: {sizes}"
  )
  return EXCHANGES[name]


def _at_once(
  exchange: Exchange,
  group: Group,
  floats: _Floats,
  plan: TokenDispatch,
  traffic: Traffic,
) -> Float[Array, "M D"]:
  """By the exchange, whose buffers suffice."""
  x, gates, kernels = floats
  plan = plan.replace(routing=plan.routing.replace(gates=gates))
  return computed(x, exchange.rows(plan, traffic, group), kernels)


def computed(
  x: Float[Array, "M D"], rows: Rows, kernels: Kernels
) -> Float[Array, "M D"]:
  """The sum over a token's experts of gate * expert(x), of experts here."""
  if isinstance(rows, Gathered):
    return rows.mine(computed(rows.everyone(x), rows.plan, kernels))
  is_weighed_here = isinstance(rows, TokenDispatch)
  if is_weighed_here and expert_ffn.platform_default(x.dtype) == "pallas_tpu":
    return weighted_experts.apply(x, rows, kernels)
  out = expert_ffn.expert_ffn(
    rows.gather(x),
    kernels,
    block_expert=rows.block_expert,
    num_blocks=rows.num_blocks,
  )
  return rows.combine(out)


@jax.named_scope(OVERFLOW)
def _around(
  group: Group, floats: _Floats, plan: TokenDispatch, traffic: Traffic
) -> Float[Array, "M D"]:
  """Tokens go around the group once; any choice fits.

  A buffer is for the tokens of one device. Backward, a device's part is
  computed again, so that this does not take N times the memory.
  """
  x, gates, kernels = floats
  plan = plan.replace(routing=plan.routing.replace(gates=gates))
  me = jax.lax.axis_index(group.axis)
  rows = group.mine(traffic.rows)
  onward = [(i, (i + 1) % group.size) for i in range(group.size)]

  @jax.checkpoint
  def visit(guests, step):
    x, travelling, out = guests
    counts = rows[(me - step) % group.size]
    here = travelling.placed(counts, num_rows=group.most_rows, group=group)
    guests = x, travelling, out + computed(x, here, kernels)
    leave = functools.partial(
      jax.lax.ppermute, axis_name=group.axis, perm=onward
    )
    return jax.tree.map(leave, guests), None

  start = x, Travelling.of(plan), jnp.zeros_like(x)
  (_, _, out), _ = jax.lax.scan(visit, start, jnp.arange(group.size))
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(static, floats, others):
  """By the exchange where it fits, else around.

  Nothing is kept for the backward pass but what comes in: what either way would
  keep, a conditional would keep of both.
  """
  fits, plan, traffic = others
  return jax.lax.cond(fits, *_ways(static), floats, plan, traffic)


def _ways(static: tuple[Exchange, Group]) -> tuple[_Way, _Way]:
  exchange, group = static
  return (
    functools.partial(_at_once, exchange, group),
    functools.partial(_around, group),
  )


def _guarded_forward(static, floats, others):
  return _guarded(static, floats, others), (floats, others)


def _guarded_backward(static, residuals, grad):
  floats, (fits, plan, traffic) = residuals

  def backward(way: _Way):
    def run(floats: _Floats, plan, traffic, grad) -> Any:
      _, pull_back = jax.vjp(lambda some: way(some, plan, traffic), floats)
      return pull_back(grad)[0]

    return run

  grads = jax.lax.cond(
    fits, *map(backward, _ways(static)), floats, plan, traffic, grad
  )
  return grads, None


_guarded.defvjp(_guarded_forward, _guarded_backward)
