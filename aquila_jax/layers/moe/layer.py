"""The mixture of experts: a router, routed experts, and a shared one."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core import axes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import RoutingStats
from aquila_jax.layers import feed_forward
from aquila_jax.layers.moe import losses
from aquila_jax.layers.moe.dispatch import Meetings
from aquila_jax.layers.moe.mixture import mixture
from aquila_jax.layers.moe.router import Router
from aquila_jax.layers.moe.shared_expert import SharedExpert
from aquila_jax.sharding.sequence import in_row_order


class MoeFeedForward(nn.Module):
  """sum over a token's A experts of gate * expert(x), in place of an FFN.

  Where the config has one, a shared expert is added to the sum.

  Attributes:
    config: of the decoder.
    token_parts: devices over which the tokens of a row lie, by
      core/token_order.py.
  """

  config: ModelConfig
  token_parts: int = 1

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    segments: Int[Array, "B T"],
    mask: Float[Array, "F"] | None = None,
    groups: Float[Array, "B T I"] | None = None,
  ) -> tuple[Float[Array, "B T D"], RoutingStats]:
    """Segment 0 is padding: it is routed nowhere and gives zeros.

    `mask` says how much each hidden unit of an expert counts; None is in full.
    The shared expert has none. `groups` are of the tokens, whose load is
    counted apart.
    """
    moe = self.config.moe
    assert moe is not None
    affinity = Router(self.config, moe, name="router")(x, valid=segments > 0)
    kernels = self._kernels(moe.num_experts, x.dtype, mask=mask)
    shared = None
    if moe.shared_expert_dim:
      shared = SharedExpert(self.config, name="shared")(x)
    if self.is_initializing():  # shapes are all that counts
      return x, losses.no_routing(moe.num_experts)
    out, sums, meetings = mixture(
      x, affinity, kernels, config=moe, token_parts=self.token_parts
    )
    if shared is not None:
      out = out + shared * affinity.valid[..., None].astype(shared.dtype)
    self._sow(meetings)
    stats = losses.routing_stats(
      sums,
      valid=affinity.valid,
      top_gate=meetings.top_gate,
      dropped=meetings.dropped,
      group_counts=None if groups is None else _of_groups(meetings, groups),
    )
    return out, stats

  def _sow(self, meetings: Meetings) -> None:
    """Experts of every token, int [B T A], where `intermediates` are wanted.

    -1 is none: of padding; where experts choose, A is E and every expert has a
    place.
    """
    if self.is_mutable_collection("intermediates"):
      ids = meetings.ids
      if self.token_parts > 1:
        ids = in_row_order(ids)
      self.sow("intermediates", "experts", ids)

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


def _of_groups(
  meetings: Meetings, groups: Float[Array, "B T I"]
) -> Float[Array, "I E"]:
  """Assignments of the tokens of each group to each expert."""
  met = meetings.assigned.astype(groups.dtype)
  return jnp.einsum("BTI,BTE->IE", groups, met)
