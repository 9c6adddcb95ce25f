"""Growth where some layers have experts and others a dense FFN.

Scale-Up copies whole layers, so what a target layer is follows from the source
layer that it copies. Scale-Out goes from one kind to two: the FFNs of a dense
model become the experts of some layers and stay the FFNs of the others. Which
rows of which leaf that is, is said here; nothing else of growth looks at it.
"""

from __future__ import annotations

from typing import Any

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth.depth import LayerMap
from aquila_jax.models.layer_runs import DENSE, EXPERTS


def check_kinds(
  layers: LayerMap, source: ModelConfig, target: ModelConfig, *, path: str
) -> None:
  """Refuses a target of which a layer is not of the kind that it copies.

  Args:
    layers: which source layer every target layer copies.
    source: what grows.
    target: what it grows into.
    path: the dotted name of `target`, for messages.

  Raises:
    errors.UserError: naming the layer, and the list that fits.
  """
  copied = layers.copies.source.tolist()
  fitting = tuple(i for i, s in enumerate(copied) if s in source.moe_layers)
  wrong = sorted(set(fitting).symmetric_difference(target.moe_layers))
  if not wrong:
    return
  assert target.moe is not None  # both have experts, or neither
  layer = wrong[0]
  kinds = {True: "experts", False: "a dense FFN"}
  raise errors.UserError(
    f"{path}.moe.layers={target.moe.layers!r}: layer {layer} has"
    f" {kinds[layer in target.moe_layers]} and copies layer {copied[layer]} of"
    f" the source, which has {kinds[layer in fitting]}; expected"
    f" {fitting}, the layers that copy experts"
    f" ({layers.copies.rule})"
  )


def check_one_width(
  source: ModelConfig, target: ModelConfig, *, path: str
) -> None:
  """Refuses FFNs that are wider or narrower than experts, of a masked growth.

  Args:
    source: what grows.
    target: what it grows into.
    path: the dotted name of `target`, for messages.

  Raises:
    errors.UserError: naming the field.
  """
  for what, model in (("the source's ", source), (f"{path}.", target)):
    if model.dense_mlp_dim != model.mlp_dim:
      raise errors.UserError(
        f"{what}moe.dense_mlp_dim={model.dense_mlp_dim}: expected"
        f" {model.mlp_dim}, the mlp_dim; a growth mask is the same for FFNs and"
        " experts"
      )


def dense_leaf(name: str) -> str:
  """The leaf of a dense model that a leaf of a mixture is made of.

  Args:
    name: of the mixture's leaf, its keys joined by dots.

  Returns:
    The name of the dense model's: the same, but for the FFNs of a mixture that
    has some left.
  """
  keys = [EXPERTS if key == DENSE else key for key in name.split(".")]
  return ".".join(keys)


def dense_index(axes: LeafAxes, index: tuple[Any, ...]) -> tuple[Any, ...]:
  """The slice of a dense model's leaf that a slice of a mixture's is made of.

  Args:
    axes: of the mixture's leaf.
    index: of its leading dimensions; along `layer` and `expert` numbers.

  Returns:
    The index of the `dense_leaf`: its layer, and no expert.
  """
  return tuple(
    axes.layer_of(i) if axis.name == "layer" else i
    for axis, i in zip(axes.axes, index, strict=False)
    if axis.name != "expert"
  )
