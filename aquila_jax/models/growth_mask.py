"""Masked Structural Growth: how much the new parts of a grown model count.

Yao et al., arXiv 2305.02869. A growth adds layers, and indices to the axes
`embed`, `mlp`, `kv_head` and `q_per_kv`. Each axis has a mask c, 1 for an old
index and m for a new one, which stands where something *reads* the axis:

  embed              in the norms, all that reads the residual x; x itself has
                     no mask: y_i = c_i x_i / sqrt(s + epsilon) * scale_i with
                     s = sum_i c_i x_i^2 / sum_i c_i, where the effective width
                     sum_i c_i is D_old + m D_new
  mlp                in the rows of the down kernel, of an FFN and of experts;
                     where some layers have each, the FFNs' own axis, dense_mlp,
                     must be as large and has this mask too
  kv_head, q_per_kv  in the rows of the output kernel; a head is old where both
                     of its indices are
  layer              a new layer's two outputs are added times m; its router's
                     losses weigh m in the mean over the layers

m = 0 is the model before the growth: s sums over the old dimensions alone and
divides by D_old, and whatever comes from a new index or a new layer is
multiplied by 0. New parameters need only be finite. The gradient of the old
parameters is that before the growth too, and that of the new ones is 0.

m = 1 is the model without a mask: every c_i is 1, and sum_i c_i is D.

In between all is smooth in m, and s stays what it is where new dimensions have
the mean square of the old ones: it is a mean with the weights c, as in the
authors' code. (Were x written times c, sum_i x_i^2 / sum_i c_i would have
weights m^2 over m: s would sink, and all outputs grow, halfway.)

Not masked, since nothing grows them: head_dim and so the norms of heads, vocab,
expert and the width of a shared expert.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from aquila_jax.core import dtypes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Leaf, RoutingStats


class Masks(struct.PyTreeNode):
  """c of every masked axis; None where an axis has no new index."""

  embed: Leaf | None = None  # float [D]
  mlp: Leaf | None = None  # float [F]
  heads: Leaf | None = None  # float [K G]
  layers: Leaf | None = None  # float [L]


NO_MASKS = Masks()


def make_masks(
  config: ModelConfig, value: Float[Array, ""] | float | None = None
) -> Masks:
  """The masks of a model, at least float32.

  Args:
    config: of the model.
    value: m in place of `config.growth_mask.value`; it may be traced.

  Returns:
    The masks; `NO_MASKS` of a model without a growth mask.

  Raises:
    ValueError: on a value for a model without a growth mask.
  """
  mask = config.growth_mask
  if mask is None:
    if value is not None:
      raise ValueError("mask_value: the model has no growth_mask")
    return NO_MASKS
  dtype = dtypes.at_least_float32(jnp.dtype(config.compute_dtype))
  m = jnp.asarray(mask.value if value is None else value, dtype)

  def along(is_new: Bool[np.ndarray, "..."]) -> Float[Array, "..."] | None:
    return jnp.where(is_new, m, jnp.ones((), dtype)) if is_new.any() else None

  new_groups = np.arange(config.num_kv_heads) >= mask.num_kv_heads
  new_queries = np.arange(config.queries_per_kv) >= mask.queries_per_kv
  return Masks(
    embed=along(np.arange(config.embed_dim) >= mask.embed_dim),
    mlp=along(np.arange(config.mlp_dim) >= mask.mlp_dim),
    heads=along(new_groups[:, None] | new_queries[None, :]),
    layers=along(np.isin(np.arange(config.num_layers), mask.new_layers)),
  )


def weigh_losses(
  routing: RoutingStats | None, config: ModelConfig, masks: Masks
) -> RoutingStats | None:
  """The routers' losses, so that their plain mean is the mean under the mask.

  A new layer's router would otherwise pull at the old layers below it before
  its output counts, and dilute the losses of theirs.

  Args:
    routing: stacked over the layers with experts; None when dense.
    config: of the model.
    masks: of the model.

  Returns:
    The statistics; loads and what is only reported are as they were. The
    balance loss is linear in `probability`, so that it weighs with it.
  """
  if routing is None or masks.layers is None:
    return routing
  layers = masks.layers[np.asarray(config.moe_layers)]
  weights = layers * layers.size / jnp.sum(layers)
  return routing.replace(
    probability=routing.probability * weights[:, None],
    sequence_balance=routing.sequence_balance * weights,
    z_loss=routing.z_loss * weights,
  )
