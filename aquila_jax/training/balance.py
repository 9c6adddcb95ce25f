"""What keeps the experts' load even: balance loss, its weights, selection bias.

The balance loss of a layer is E sum_i f_i P_i. P is a mean over tokens and adds
up over microbatches; f P does not, so it matters which tokens f is of. With n_m
tokens in microbatch m, f_m and P_m of it, N = sum_m n_m:

  global       sum_m n_m / N E sum_i f_i P_mi with f of the whole batch: the
               loss, and the gradient, of the batch in one piece. Under
               accumulation f comes from a first forward pass.
  running      the same with f of the microbatches so far, this one included
  micro_batch  the same with f = f_m
  sequence     of every row by itself (DeepSeek-V3, arXiv 2412.19437, eqs.
               17-20, with a row in the place of a sequence)

Each is the same under any sharding: arrays are global inside `jit`. Where an
expert has a capacity, or chooses its tokens, each microbatch is served by
itself, and so none of them is the batch in one piece.

Adaptive weights (Skywork-MoE, arXiv 2406.06563, section 4.2). After a step in
which layer l dropped the share d_l of its assignments

  alpha_l <- beta alpha_l + (1 - beta) min(xi d_l, alpha_max)

in which the paper has xi = 1/5, alpha_max = 0.01, beta = 0.99. Dropless, d is
the share that a capacity factor of 1 would drop, sum_i max(0, f_i - 1/E): our
definition. Ours is also the mean over the layers, where the paper has the sum.

Selection bias (Wang et al., arXiv 2408.15664, algorithm 1). After a step in
which expert i got the share f_i of all assignments of the batch

  b_i <- b_i + rate sign(mean f - f_i)
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from aquila_jax.core.experiment_config import (
  AdaptiveBalance,
  BalanceOver,
  LossConfig,
)
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Leaf, Params, RoutingStats


class BalanceInputs(struct.PyTreeNode):
  """What a microbatch does not know by itself."""

  # Sums over microbatches of load times the share of the batch's tokens.
  total: Leaf | None = None  # float [L E]; of all, where there was a first pass
  so_far: Leaf | None = None  # float [L E]; of those before this one
  weights: Leaf | None = None  # float [L]; None is LossConfig.balance for all


@runtime_checkable
class BalanceRule(Protocol):
  """Which tokens the load in the balance loss is of."""

  def loss(
    self, routing: RoutingStats, inputs: BalanceInputs
  ) -> Float[Array, "L"]:
    """A microbatch's part; `routing` is times its share of the tokens."""
    ...


class _Global:
  def loss(
    self, routing: RoutingStats, inputs: BalanceInputs
  ) -> Float[Array, "L"]:
    total = routing.load if inputs.total is None else inputs.total
    return routing.balance(_shares(total))


class _Running:
  def loss(
    self, routing: RoutingStats, inputs: BalanceInputs
  ) -> Float[Array, "L"]:
    so_far = routing.load
    if inputs.so_far is not None:
      so_far = so_far + inputs.so_far.astype(so_far.dtype)
    return routing.balance(_shares(so_far))


class _MicroBatch:
  def loss(
    self, routing: RoutingStats, inputs: BalanceInputs
  ) -> Float[Array, "L"]:
    del inputs
    return routing.balance(_shares(routing.load))


class _Sequence:
  def loss(
    self, routing: RoutingStats, inputs: BalanceInputs
  ) -> Float[Array, "L"]:
    del inputs
    return routing.sequence_balance


_RULES: dict[BalanceOver, type[BalanceRule]] = {
  "global": _Global,
  "running": _Running,
  "micro_batch": _MicroBatch,
  "sequence": _Sequence,
}


def make_rule(balance_over: BalanceOver) -> BalanceRule:
  """The rule of `LossConfig.balance_over`."""
  return _RULES[balance_over]()


def _shares(load: Float[Array, "L E"]) -> Float[Array, "L E"]:
  """Of sum 1 in each layer; zeros where no token was."""
  total = jnp.sum(load, axis=-1, keepdims=True)
  return load / jnp.maximum(total, jnp.finfo(load.dtype).tiny)


def initial_weights(
  config: LossConfig, model: ModelConfig
) -> Float[np.ndarray, "L"] | None:
  """Adaptive weights before the first step; None where none adapt."""
  if config.adaptive_balance is None or model.moe is None:
    return None
  return np.full(model.num_layers, config.balance, np.float32)


def next_weights(
  weights: Float[Array, "L"],
  routing: RoutingStats,
  *,
  config: AdaptiveBalance,
  model: ModelConfig,
) -> Float[Array, "L"]:
  """Adaptive weights after a step.

  Args:
    weights: alpha, before it.
    routing: of the step's whole batch.
    config: xi, alpha_max and beta.
    model: with experts; its capacity says what a dropped assignment is.

  Returns:
    alpha for the next step.
  """
  assert model.moe is not None
  dropped = routing.dropped
  if model.moe.capacity_factor is None:
    over = routing.load - 1 / model.moe.num_experts
    dropped = jnp.sum(jnp.maximum(over, 0), axis=-1)
  target = jnp.minimum(config.sensitivity * dropped, config.maximum)
  rest = 1 - config.smoothing
  return weights + rest * (target.astype(weights.dtype) - weights)


def move_selection_bias(
  params: Params, *, axes: Any, load: Float[Array, "L E"], rate: float
) -> Params:
  """Moves every selection bias by `rate` towards an even load.

  Args:
    params: of the model.
    axes: the `LeafAxes` of every parameter, which say what is such a bias.
    load: f, of the step's whole batch.
    rate: of one step.

  Returns:
    The parameters; all other leaves are as they were.
  """
  mean = jnp.mean(load, axis=-1, keepdims=True)
  missing = mean - load
  # Loads are counts over a number; two that are the same count may differ by a
  # few roundings.
  even = jnp.abs(missing) <= 4 * jnp.finfo(load.dtype).eps * mean
  step = rate * jnp.where(even, jnp.zeros_like(load), jnp.sign(missing))
  return jax.tree.map(
    lambda leaf_axes, leaf: (
      leaf + step.astype(leaf.dtype) if leaf_axes.is_selection_bias else leaf
    ),
    axes,
    params,
  )


def has_selection_bias(model: ModelConfig) -> bool:
  """Whether training moves one."""
  return model.moe is not None and model.moe.selection_bias
