"""The dense SwiGLU feed-forward network, arXiv 2002.05202."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.core import axes
from aquila_jax.core.axes import Axis
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.layers.linear import project
from aquila_jax.sharding.rules import constrained, gathered

# The kernels of one FFN and their axes. A mixture has the same three names with
# an `expert` axis in front, so that Scale-Out is: this leaf gains that axis.
KERNEL_AXES = {
  "gate_kernel": (axes.reads("embed"), axes.writes("mlp")),
  "up_kernel": (axes.reads("embed"), axes.writes("mlp")),
  "down_kernel": (axes.reads("mlp"), axes.writes("embed")),
}


def kernel_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
  """The shape of one expert's kernel `name`, a key of KERNEL_AXES."""
  return _shape(config, KERNEL_AXES[name])


def _shape(config: ModelConfig, leaf_axes: Sequence[Axis]) -> tuple[int, ...]:
  sizes = {
    "embed": config.embed_dim,
    "mlp": config.mlp_dim,
    "dense_mlp": config.dense_mlp_dim,
  }
  return tuple(sizes[axis.name] for axis in leaf_axes)


def dense_kernel_axes(config: ModelConfig) -> dict[str, tuple[Axis, ...]]:
  """The axes of the kernels of a layer without experts.

  Beside layers with experts its hidden width is an axis of its own, also where
  the two are equal: it can grow, lie and stand still by itself.
  """
  if not config.is_mixed:
    return KERNEL_AXES
  return {
    name: tuple(
      dataclasses.replace(axis, name="dense_mlp")
      if axis.name == "mlp"
      else axis
      for axis in leaf_axes
    )
    for name, leaf_axes in KERNEL_AXES.items()
  }


def mask_rows(
  down: Float[Array, "*E F D"], mask: Float[Array, "F"] | None
) -> Float[Array, "*E F D"]:
  """The down kernel, with each hidden unit's row times its `mask`."""
  if mask is None:
    return down
  rows = mask.astype(down.dtype)[:, None]  # (F,) -> (F, 1)
  return down * jnp.expand_dims(rows, tuple(range(down.ndim - 2)))


class FeedForward(nn.Module):
  """down(silu(x gate) * (x up)), without biases."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], *, mask: Float[Array, "F"] | None = None
  ) -> Float[Array, "B T D"]:
    """`mask` says how much each hidden unit counts; None is in full."""
    gate, up, down = (
      self.param(
        name,
        axes.declare(nn.initializers.normal(self.config.init_std), leaf_axes),
        _shape(self.config, leaf_axes),
        jnp.dtype(self.config.param_dtype),
      )
      for name, leaf_axes in dense_kernel_axes(self.config).items()
    )
    kernels = (gate, up, mask_rows(down, mask))
    gate, up, down = (
      gathered(kernel.astype(x.dtype), [axis.name for axis in leaf_axes])
      for kernel, leaf_axes in zip(
        kernels, dense_kernel_axes(self.config).values(), strict=True
      )
    )
    hidden = jax.nn.silu(project(x, gate)) * project(x, up)
    axis = dense_kernel_axes(self.config)["down_kernel"][0].name
    return project(constrained(hidden, "row", "token", axis), down)
