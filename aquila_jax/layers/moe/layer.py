"""The mixture of experts: router -> dispatch -> experts -> combine."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import RoutingStats
from aquila_jax.kernels.expert_ffn import api as expert_ffn
from aquila_jax.layers import feed_forward
from aquila_jax.layers.moe import dispatch, losses, router
from aquila_jax.layers.moe.shared_expert import SharedExpert


class MoeFeedForward(nn.Module):
  """sum over a token's A experts of gate * expert(x), in place of an FFN.

  Where the config has one, a shared expert is added to the sum.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"],
    mask: Float[Array, "F"] | None = None,
  ) -> tuple[Float[Array, "B T D"], RoutingStats]:
    """Segment 0 is padding: it is routed nowhere and gives zeros.

    `mask` says how much each hidden unit of an expert counts; None is in full.
    The shared expert has none.
    """
    moe = self.config.moe
    assert moe is not None
    tokens = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (M, D)
    routing = router.Router(self.config, moe, name="router")(
      tokens, valid=segments.reshape(-1) > 0
    )
    plan = dispatch.make_dispatcher(moe).dispatch(routing)
    rows = expert_ffn.expert_ffn(
      dispatch.gather_rows(tokens, plan),
      self._kernels(moe.num_experts, x.dtype, mask=mask),
      block_expert=plan.block_expert,
      num_blocks=plan.num_blocks,
    )
    out = dispatch.combine_rows(rows, plan, gates=routing.gates)
    if moe.shared_expert_dim:
      shared = SharedExpert(self.config, name="shared")(tokens)
      out = out + shared * routing.valid[:, None].astype(shared.dtype)
    stats = losses.routing_stats(routing, kept=plan.kept)
    return out.reshape(x.shape), stats

  def _kernels(
    self, num_experts: int, dtype: jnp.dtype, *, mask: Float[Array, "F"] | None
  ):
    """Gate, up, down: the dense FFN's leaves with `expert` in front."""
    gate, up, down = (
      self.param(
        name,
        axes.declare(
          nn.initializers.normal(self.config.init_std),
          [axes.neither("expert"), *leaf_axes],
        ),
        (num_experts, *feed_forward.kernel_shape(self.config, name)),
        jnp.dtype(self.config.param_dtype),
      )
      for name, leaf_axes in feed_forward.KERNEL_AXES.items()
    )
    down = feed_forward.mask_rows(down, mask)
    return gate.astype(dtype), up.astype(dtype), down.astype(dtype)
