"""Scale-Up: a model of more width and depth from a smaller one.

  fpi      every index map copies the layer's own values. Keeps the function at
           an integer factor of the residual width with the circular map, any
           factor of the FFN, any query heads inside their groups, whole
           key/value groups, and equal depth. Otherwise near it.
  aki      the new outputs of a layer are those of the next layer of the source
           (bert2BERT, arXiv 2110.07143, section 3.3). Keeps nothing, by design:
           the copies differ, so training can tell them apart from the start.
  aki_pro  aki with depth by interpolation, key/value groups kept and query
           heads grown inside them (AquilaMoE, arXiv 2408.06567, section 2.2).
  random   the target's initialisation; nothing of the source but its tokenizer.

Width comes before depth: "next layer" is the next layer of the source, and the
copies of an interpolated layer are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.lineage import Event
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.core.types import Params
from aquila_jax.growth import axis_map, depth
from aquila_jax.growth.axis_map import PARAMETERS, AxisMap, AxisMaps, Powers
from aquila_jax.growth.optimizer_state import grow_moments
from aquila_jax.models import decoder_lm

# The axes that Scale-Up may grow, and the config field that sets each.
_GROWN = {
  "layer": "num_layers",
  "embed": "embed_dim",
  "mlp": "mlp_dim",
  "kv_head": "num_kv_heads",
  "q_per_kv": "num_heads",
}
# What the target must share with the source, and why.
_KEPT = {
  "vocab_size": "the tokenizer stays",
  "head_dim": "RoPE turns each pair of a head at a rate of its own, so heads"
  " grow in number, not in width",
  "rope_theta": "another base turns every head",
  "rope_scaling": "another scaling turns every head",
  "sliding_window": "another window sees other keys",
  "norm_epsilon": "another epsilon changes every norm",
  "qkv_bias": "growth adds no leaves",
  "out_bias": "growth adds no leaves",
  "qk_norm": "growth adds no leaves",
  "tied_embeddings": "growth adds no leaves",
  "moe": "Scale-Out makes experts",
  "growth_mask": "train the source with mask_steps until its mask is 1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
  """A method: one map an axis, and whose values the new indices take."""

  width: AxisMaps  # of every axis but `layer`
  layers: AxisMap
  # Written axes whose new indices take the values of the next layer of the
  # source; none is FPI.
  from_next_layer: frozenset[str] = frozenset()

  def __post_init__(self):
    for name, axis in {**self.width, "layer": self.layers}.items():
      assert axis.uses_all, f"a source index of {name} is left unused"

  def layer(
    self, axes: LeafAxes, *, powers: Powers = PARAMETERS
  ) -> Callable[..., Float[Array, "*target"]]:
    """`leaf` a layer at a time.

    Args:
      axes: of the whole leaf, of which `layer` is the first.
      powers: as for `leaf`.

    Returns:
      A compiled function of two layers of the source's leaf, those that
      `source_layers` names, to a layer of the grown leaf.
    """
    rest = LeafAxes(axes.axes[1:])
    new = self._new_outputs(axes)

    @jax.jit
    def grow(own, above):
      # Compiled, as `leaf` is in a growth: a division by constants is then a
      # product with their reciprocals, which rounds otherwise.
      grown = axis_map.map_axes(own, rest, self.width, powers=powers)
      if new is None:
        return grown
      above = axis_map.map_axes(above, rest, self.width, powers=powers)
      return jnp.where(new[0], above, grown)

    return grow

  def source_layers(self, layer: int) -> tuple[int, int]:
    """The layer that a target layer copies, and the one above that."""
    own = int(self.layers.source[layer])
    return own, int(_next_layer(self.layers.source_size).source[own])

  def leaf(
    self,
    leaf: Float[Array, "*source"],
    axes: LeafAxes,
    *,
    powers: Powers = PARAMETERS,
  ) -> Float[Array, "*target"]:
    """Grows one leaf: width from one layer or two, then depth."""
    grown = axis_map.map_axes(leaf, axes, self.width, powers=powers)
    new = self._new_outputs(axes)
    if new is not None:
      maps = {**self.width, "layer": _next_layer(self.layers.source_size)}
      above = axis_map.map_axes(leaf, axes, maps, powers=powers)
      grown = jnp.where(new, above, grown)
    return axis_map.map_axes(grown, axes, {"layer": self.layers})

  def tree(
    self, tree: Params, axes: Any, *, powers: Powers = PARAMETERS
  ) -> Params:
    """Grows every leaf of a tree that is shaped as the parameters."""
    return jax.tree.map(
      lambda leaf, leaf_axes: self.leaf(leaf, leaf_axes, powers=powers),
      tree,
      axes,
    )

  @property
  def new_indices(self) -> dict[str, list[list[int]]]:
    """For each axis that grew, the half-open ranges that are new."""
    maps = {**self.width, "layer": self.layers}
    grown = {name: m.new_ranges for name, m in maps.items()}
    return {name: ranges for name, ranges in grown.items() if ranges}

  def _new_outputs(self, axes: LeafAxes) -> Bool[np.ndarray, "..."] | None:
    """Which elements are the next layer's, broadcastable to the grown leaf.

    None where there are none, as for what lies outside the layers.
    """
    if not axes.has("layer"):
      return None
    rank = len(axes.axes)
    new = np.zeros((1,) * rank, bool)
    for dim, axis in enumerate(axes.axes):
      if axis.role == Role.WRITES and axis.name in self.from_next_layer:
        new = new | axis_map.along(dim, self.width[axis.name].is_new, rank=rank)
    return new if new.any() else None


def _next_layer(num_layers: int) -> AxisMap:
  """Layer l takes l + 1. The last has none above it and stays: FPI."""
  above = np.minimum(np.arange(num_layers) + 1, num_layers - 1)
  return AxisMap(above, num_layers)


def make_growth(
  source: ModelConfig,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  path: str = "config.model",
) -> Growth:
  """The maps by which `source` becomes `target`.

  Args:
    source: what is there.
    target: what is wanted: no smaller in any direction.
    options: the method, fpi, aki or aki_pro, and its options.
    seed: of random width maps.
    path: the dotted name of `target`, for messages.

  Returns:
    The growth.

  Raises:
    errors.UserError: where no such growth exists; it names the field.
  """
  check_pair(source, target, options, path=path)
  old, new = _sizes(source), _sizes(target)

  def width_map(name: str) -> AxisMap:
    if options.width_map == "random":
      return axis_map.random(old[name], new[name], name=name, seed=seed)
    return axis_map.circular(old[name], new[name])

  width = {name: width_map(name) for name in _GROWN if name != "layer"}
  from_next_layer = frozenset(width)
  if options.method == "fpi":
    from_next_layer = frozenset()
  elif options.aki_residual == "own_layer":
    from_next_layer -= {"embed"}
  return Growth(
    width=width,
    layers=depth.depth_map(options.depth, old["layer"], new["layer"]),
    from_next_layer=from_next_layer,
  )


def new_indices(
  source: ModelConfig,
  target: ModelConfig,
  options: ScaleUp,
  *,
  path: str = "config.model",
) -> dict[str, list[list[int]]]:
  """For each axis, the half-open ranges that a growth adds.

  Args:
    source: what is there.
    target: what is wanted.
    options: the method and its options.
    path: the dotted name of `target`, for messages.

  Returns:
    Ranges by axis name; of method='random', which keeps nothing, everything.

  Raises:
    errors.UserError: as `scale_up`.
  """
  if options.method != "random":
    return make_growth(source, target, options, path=path).new_indices
  check_pair(source, target, options, path=path)
  # Every leaf has one of these two.
  everything = {"embed": target.embed_dim, "head_dim": target.head_dim}
  return {axis: [[0, size]] for axis, size in everything.items()}


def check_pair(
  source: ModelConfig, target: ModelConfig, options: ScaleUp, *, path: str
) -> None:
  """Refuses a target that the source cannot grow into.

  Raises:
    errors.UserError: naming the field, its value, what was expected and why.
  """
  if options.method == "random" and options.optimizer == "grow":
    raise errors.UserError(
      "optimizer='grow': expected 'reset'; method='random' keeps no parameter"
      " that moments could belong to"
    )
  for field, reason in _KEPT.items():
    given, needed = getattr(target, field), getattr(source, field)
    if given != needed:
      raise errors.UserError(
        f"{path}.{field}={_shown(given)}: expected the source's"
        f" {_shown(needed)}; {reason}"
      )
  if options.method == "random":
    return
  groups = target.num_kv_heads
  if options.method == "aki_pro" and groups != source.num_kv_heads:
    raise errors.UserError(
      f"{path}.num_kv_heads={groups}: expected the source's"
      f" {source.num_kv_heads}; method='aki_pro' keeps the key/value groups and"
      " grows query heads inside them, method='aki' or 'fpi' can add groups"
    )
  old, new = _sizes(source), _sizes(target)
  for axis, field in _GROWN.items():
    # As many query heads as before in each of the target's groups.
    least = old[axis] * (groups if axis == "q_per_kv" else 1)
    if new[axis] < old[axis]:
      raise errors.UserError(
        f"{path}.{field}={getattr(target, field)}: expected at least {least};"
        " Scale-Up does not shrink"
        + (f" a group of {old[axis]} heads" if axis == "q_per_kv" else "")
      )


def scale_up(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
) -> StoredModel:
  """Grows a model, its average and, if asked, its Adam moments.

  What is preserved stands at the top of this module.

  Args:
    source: the model to grow; it is not changed.
    target: the architecture to grow into.
    options: method, maps, depth rule, and whether moments are grown or left
      out (`optimizer`).
    seed: of random width maps, and of the method `random`.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.

  Returns:
    The grown model, in the target's parameter dtype; its lineage has one more
    event.

  Raises:
    errors.UserError: as `make_growth`, or on method='random' with
      optimizer='grow'.
  """
  if options.method == "random":
    check_pair(source.config, target, options, path=path)
    initialise = jax.jit(functools.partial(decoder_lm.init_params, target))
    trees = (initialise(key=jax.random.key(seed)), None, None)
  else:
    growth = make_growth(source.config, target, options, seed=seed, path=path)
    trees = _grow(source, growth, keep_moments=options.optimizer == "grow")
  params, moments, ema = trees
  return dataclasses.replace(
    grown_header(source, target, options, seed=seed, name=name, path=path),
    params=_as_declared(params, target),
    moments=moments,
    ema=ema,
  )


def grown_header(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int,
  name: str,
  path: str,
) -> StoredModel:
  """What `scale_up` makes of a model but for its arrays: shapes of parameters.

  Args and errors are those of `scale_up`.
  """
  event = Event(
    kind="scale_up",
    name=name,
    parent=options.source,
    options=config_lib.to_dict(options) | {"seed": seed},
    new_indices=new_indices(source.config, target, options, path=path),
  )
  return dataclasses.replace(
    source,
    config=target,
    lineage=source.lineage.then(event),
    params=decoder_lm.abstract_params(target),
    moments=None,
    ema=None,
  )


def _grow(
  source: StoredModel, growth: Growth, *, keep_moments: bool
) -> tuple[Params, AdamMoments | None, Params | None]:
  """Parameters, moments and average, in one program."""
  axes = decoder_lm.parameter_axes(source.config)

  @jax.jit
  def grow(params, moments, ema):
    if moments is not None:
      moments = grow_moments(
        moments, lambda tree, powers: growth.tree(tree, axes, powers=powers)
      )
    if ema is not None:
      ema = growth.tree(ema, axes)
    return growth.tree(params, axes), moments, ema

  moments = source.moments if keep_moments else None
  return grow(source.params, moments, source.ema)


def _as_declared(params: Params, target: ModelConfig) -> Params:
  """Casts to the target's dtype; every leaf must have the target's shape."""

  def cast(leaf, declared):
    assert leaf.shape == declared.shape, (leaf.shape, declared.shape)
    return leaf.astype(declared.dtype)

  return jax.tree.map(cast, params, decoder_lm.abstract_params(target))


def _sizes(config: ModelConfig) -> dict[str, int]:
  return axis_map.axis_sizes(
    decoder_lm.parameter_axes(config), decoder_lm.abstract_params(config)
  )


def _shown(value: Any) -> str:
  is_section = dataclasses.is_dataclass(value)
  return repr(config_lib.to_dict(value)) if is_section else repr(value)
