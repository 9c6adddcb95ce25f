"""The expert that every token meets, beside those that the router chooses."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.layers.linear import project
from aquila_jax.sharding.rules import constrained

# As feed_forward.KERNEL_AXES: a width of its own has an axis of its own.
_KERNEL_AXES = {
  "gate_kernel": (axes.reads("embed"), axes.writes("shared_mlp")),
  "up_kernel": (axes.reads("embed"), axes.writes("shared_mlp")),
  "down_kernel": (axes.reads("shared_mlp"), axes.writes("embed")),
  # Not SwiGLU's gate: how much of the whole expert a token takes.
  "token_gate_kernel": (axes.reads("embed"), axes.writes("shared_expert")),
}


class SharedExpert(nn.Module):
  """sigmoid(x w) * down(silu(x gate) * (x up)), as in Qwen2-MoE.

  DeepSeekMoE (arXiv 2401.06066, section 3.2) has it without sigmoid(x w), which
  is `shared_expert_gate=False`.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
    moe = self.config.moe
    assert moe is not None
    gate, up, down = (
      self._kernel(name, x.dtype)
      for name in ("gate_kernel", "up_kernel", "down_kernel")
    )
    hidden = jax.nn.silu(project(x, gate)) * project(x, up)
    out = project(constrained(hidden, "row", "token", "shared_mlp"), down)
    if moe.shared_expert_gate:
      share = project(x, self._kernel("token_gate_kernel", x.dtype))
      out = out * jax.nn.sigmoid(share)
    return out

  def _kernel(self, name: str, dtype: jnp.dtype) -> Float[Array, "in out"]:
    moe = self.config.moe
    assert moe is not None
    sizes = {
      "embed": self.config.embed_dim,
      "shared_mlp": moe.shared_expert_dim,
      "shared_expert": 1,
    }
    leaf_axes = _KERNEL_AXES[name]
    kernel = self.param(
      name,
      axes.declare(nn.initializers.normal(self.config.init_std), leaf_axes),
      tuple(sizes[axis.name] for axis in leaf_axes),
      jnp.dtype(self.config.param_dtype),
    )
    return kernel.astype(dtype)
