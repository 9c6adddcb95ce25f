"""The router: which experts a token goes to, and with what weight."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from aquila_jax.core import axes, dtypes
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.types import Leaf


class Routing(struct.PyTreeNode):
  """The router's decision for M tokens."""

  logits: Leaf  # float [M E]; float32
  experts: Leaf  # int [M A]; chosen experts, best first
  gates: Leaf  # float [M A]; their weights, float32
  valid: Leaf  # bool [M]; False for padding: no place, no count


def choose(
  logits: Float[Array, "M E"], *, valid: Bool[Array, "M"], config: MoeConfig
) -> Routing:
  """Top-k experts and gates from router logits, in the logits' dtype.

  `topk_then_softmax` (Mixtral): softmax over the A chosen logits; the gates sum
  to one. `softmax_then_topk` (Switch, GShard): softmax over all E, then the A
  largest, divided by their sum under `renormalise`. On ties the lowest expert
  wins, as in `jax.lax.top_k`.
  """
  if config.router_order == "topk_then_softmax":
    top_logits, experts = jax.lax.top_k(logits, config.top_k)
    gates = jax.nn.softmax(top_logits, axis=-1)
  else:
    scores = jax.nn.softmax(logits, axis=-1)
    gates, experts = jax.lax.top_k(scores, config.top_k)
    if config.renormalise:
      gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
  gates = jnp.where(valid[:, None], gates, jnp.zeros((), gates.dtype))
  return Routing(logits=logits, experts=experts, gates=gates, valid=valid)


class Router(nn.Module):
  """Logits x W, at least float32 whatever the compute dtype, then `choose`."""

  config: ModelConfig
  moe: MoeConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "M D"], *, valid: Bool[Array, "M"]
  ) -> Routing:
    kernel = self.param(
      "kernel",
      axes.declare(
        nn.initializers.normal(self.moe.router_init_std),
        [axes.reads("embed"), axes.writes("expert")],
      ),
      (self.config.embed_dim, self.moe.num_experts),
      jnp.dtype(self.config.param_dtype),
    )
    dtype = dtypes.at_least_float32(x.dtype)
    logits = jnp.einsum("MD,DE->ME", x.astype(dtype), kernel.astype(dtype))
    return choose(logits, valid=valid, config=self.moe)
