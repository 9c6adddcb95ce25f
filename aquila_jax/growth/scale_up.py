"""Scale-Up: a model of more width and depth from a smaller one.

A method (methods.py) chooses a `Growth` from the sizes of source and target;
here the pair is checked, and the growth is applied to parameters, average and
moments, in memory. streaming.py does the same from disk to disk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax.core import config as config_lib
from aquila_jax.core import dtypes, errors
from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.lineage import Event
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.growth import axis_map, methods
from aquila_jax.growth.axis_map import PARAMETERS
from aquila_jax.growth.exactness import Check, Exactness, predict
from aquila_jax.growth.grown_tree import (
  ArrayTree,
  GrownTree,
  LeafSpec,
  leaf_specs,
  materialise,
)
from aquila_jax.growth.growth import Growth
from aquila_jax.growth.layer_kinds import check_kinds, check_one_width
from aquila_jax.growth.optimizer_state import FIRST_MOMENT, SECOND_MOMENT
from aquila_jax.models import decoder_lm

# What the target must share with the source, and why.
_KEPT = {
  "head_dim": "RoPE turns each pair of a head at a rate of its own, so heads"
  " grow in number, not in width",
  "sliding_window": "another window sees other keys",
  "qkv_bias": "growth adds no leaves",
  "out_bias": "growth adds no leaves",
  "qk_norm": "growth adds no leaves",
  "tied_embeddings": "growth adds no leaves",
  "moe": "Scale-Out makes experts",
  "growth_mask": "a growth puts it on",
}
_EXTENDED = {
  "rope_theta": "another base turns every head",
  "rope_scaling": "another scaling turns every head",
}

# The trees that go along with the parameters: their names, and how.
POWERS = {
  "params": PARAMETERS,
  "ema": PARAMETERS,
  "mu": FIRST_MOMENT,
  "nu": SECOND_MOMENT,
}


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
    options: the method, any but random, and its options.
    seed: of random width maps.
    path: the dotted name of `target`, for messages.

  Returns:
    The growth.

  Raises:
    errors.UserError: where no such growth exists; it names the field, or of
      maps the leaf that they do not fill.
  """
  check_pair(source, target, options, path=path)
  pair = methods.Pair(
    old=model_sizes(source),
    new=model_sizes(target),
    options=options,
    seed=seed,
    path=path,
  )
  what = methods.option(path, "method")
  growth = methods.find(options.method, what=what)(pair)
  check_kinds(growth.layers, source, target, path=path)
  if growth.masked:
    check_one_width(source, target, path=path)
  _check_maps(growth, source, target)
  _check_epsilon(growth, source, target, path=path)
  return growth


def check_pair(
  source: ModelConfig, target: ModelConfig, options: ScaleUp, *, path: str
) -> None:
  """Refuses a target that the source cannot grow into.

  Raises:
    errors.UserError: naming the field, its value, what was expected and why.
  """
  if options.method in ("random", "ligo") and options.optimizer == "grow":
    raise errors.UserError(
      f"{methods.option(path, 'optimizer')}='grow': expected 'reset';"
      f" method={options.method!r} keeps no parameter that moments could belong"
      " to"
    )
  refuse_masked(source)
  kept = dict(_KEPT)
  if options.context == "keep":
    kept |= {
      field: f"{reason}; init.context='extend' allows it"
      for field, reason in _EXTENDED.items()
    }
  for field, reason in kept.items():
    given, needed = getattr(target, field), getattr(source, field)
    given, needed = _experts_alone(given), _experts_alone(needed)
    if given != needed:
      name, given, needed = _difference(field, given, needed)
      raise errors.UserError(
        f"{path}.{name}={_shown(given)}: expected the source's"
        f" {_shown(needed)}; {reason}"
      )
  old, new = source.vocab_size, target.vocab_size
  if new != old and (options.vocabulary == "keep" or new < old):
    raise errors.UserError(
      f"{path}.vocab_size={new}: expected the source's {old}"
      + (
        "; the tokenizer stays; init.vocabulary='mean' adds rows"
        if new > old
        else " or more; Scale-Up does not shrink"
      )
    )
  if options.method != "random":
    _check_sizes(source, target, path=path)


def _experts_alone(value: Any) -> Any:
  """Experts without where they are, and without what stands elsewhere.

  The one follows from the layers' copies, the other is a width and grows.
  """
  if isinstance(value, MoeConfig):
    return dataclasses.replace(value, layers="all", dense_mlp_dim=None)
  return value


def refuse_masked(source: ModelConfig) -> None:
  """Refuses a source of which a part counts in part.

  Raises:
    errors.UserError: saying what to do.
  """
  mask = source.growth_mask
  if mask is not None:
    raise errors.UserError(
      f"the source's growth_mask is {mask.value:g}: what a masked growth added"
      " does not count whole; train the source with mask_steps until its mask"
      " is 1"
    )


def _check_sizes(
  source: ModelConfig, target: ModelConfig, *, path: str
) -> None:
  old, new = model_sizes(source), model_sizes(target)
  for axis, field in methods.FIELDS.items():
    if axis not in old or axis not in new:  # check_kinds refuses one alone
      continue
    # As many query heads as before in each of the target's groups.
    groups = target.num_kv_heads if axis == "q_per_kv" else 1
    if new[axis] < old[axis]:
      raise errors.UserError(
        f"{path}.{field}={operator.attrgetter(field)(target)}: expected at"
        f" least {old[axis] * groups}; Scale-Up does not shrink"
        + (f" a group of {old[axis]} heads" if axis == "q_per_kv" else "")
      )


def _check_maps(
  growth: Growth, source: ModelConfig, target: ModelConfig
) -> None:
  """Refuses maps that do not use all of the source and fill all of the target.

  Raises:
    errors.UserError: naming the axis, and a leaf that has it.
  """
  old, new = model_sizes(source), model_sizes(target)
  leaves = model_leaves(target)
  lost = set(model_leaves(source)).symmetric_difference(leaves)
  assert not lost, f"leaves of one of the two only: {sorted(lost)}"
  for name in growth.from_next_layer.difference(methods.WIDTH):
    raise errors.unknown_name("from_next_layer", name, methods.WIDTH)
  for axis in filter(new.__contains__, methods.FIELDS):
    g = growth.maps.get(axis)
    leaf = next(n for n, spec in leaves.items() if spec.axes.has(axis))
    if g is None:
      if old[axis] == new[axis]:
        continue
      raise errors.UserError(
        f"the method has no map of {axis}, which leaf {leaf!r} has: it grows"
        f" from {old[axis]} to {new[axis]}"
      )
    if (g.source_size, g.target_size) != (old[axis], new[axis]):
      raise errors.UserError(
        f"the map of {axis} goes from {g.source_size} to {g.target_size}, leaf"
        f" {leaf!r} from {old[axis]} to {new[axis]}"
      )
    if g.unused:
      raise errors.UserError(
        f"the map of {axis} copies index {g.unused[0]} nowhere, so a part of"
        f" leaf {leaf!r} is lost; Scale-Up does not shrink"
      )


def _check_epsilon(
  growth: Growth, source: ModelConfig, target: ModelConfig, *, path: str
) -> None:
  factor = growth.mean_square_factor
  needed = source.norm_epsilon * (1.0 if factor is None else factor)
  given = target.norm_epsilon
  allowed = {source.norm_epsilon, needed}
  if not any(math.isclose(given, e, rel_tol=1e-6) for e in allowed):
    raise errors.UserError(
      f"{path}.norm_epsilon={given:.9g}: expected the source's"
      f" {source.norm_epsilon:.9g}"
      + (
        f", or {needed:.9g}, at which these maps are exact"
        if len(allowed) > 1
        else "; another epsilon changes every norm"
      )
    )
  if source.head_norm_epsilon != target.head_norm_epsilon and (
    target.qk_norm_epsilon is not None
  ):
    raise errors.UserError(
      f"{path}.qk_norm_epsilon={target.qk_norm_epsilon}: expected the source's"
      f" {source.head_norm_epsilon}; heads do not grow"
    )


def scale_up(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
  shardings: Any = None,
) -> StoredModel:
  """Grows a model, its average and, if asked, its Adam moments.

  Args:
    source: the model to grow; it is not changed.
    target: the architecture to grow into.
    options: method, maps, depth rule, and whether moments are grown or left
      out (`optimizer`).
    seed: of what is drawn: random width maps, noise, new entries, and the
      whole of the method `random`.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.
    shardings: a tree of NamedSharding, shaped as the target's parameters: where
      these, average and moments are to lie. A slice of a leaf at a time goes
      there. None leaves it to JAX.

  Returns:
    The grown model, in the target's parameter dtype; its lineage has one more
    event, which says what was kept.

  Raises:
    errors.UserError: as `make_growth`, or on method='random' with
      optimizer='grow'.
  """
  plan = plan_growth(source.config, target, options, seed=seed, path=path)
  header = _header(source, plan, options, seed=seed, name=name)
  if options.method == "random":
    initialise = jax.jit(
      functools.partial(decoder_lm.init_params, target), out_shardings=shardings
    )
    return dataclasses.replace(
      header, params=initialise(key=jax.random.key(seed))
    )
  growth = plan.growth
  assert growth is not None
  refuse_learned(growth)
  by_leaf = None
  if shardings is not None:
    by_leaf = dict(
      zip(model_leaves(target), jax.tree.leaves(shardings), strict=True)
    )

  def grown(role: str, tree: Any) -> Any:
    leaves = model_leaves(target, role=role)
    grown_tree = GrownTree(
      ArrayTree(tree), growth, leaves=leaves, powers=POWERS[role], seed=seed
    )
    return materialise(grown_tree, leaves, shardings=by_leaf)

  moments = source.moments if options.optimizer == "grow" else None
  return dataclasses.replace(
    header,
    params=grown("params", source.params),
    moments=None
    if moments is None
    else AdamMoments(
      count=moments.count,
      mu=grown("mu", moments.mu),
      nu=grown("nu", moments.nu),
    ),
    ema=None if source.ema is None else grown("ema", source.ema),
  )


def refuse_learned(growth: Growth) -> None:
  """Refuses a growth that is more than its maps.

  Raises:
    errors.UserError: saying what can make it.
  """
  if growth.learned:
    raise errors.UserError(
      "method='ligo': it is learned on text; expected a stage of a config, run"
      " by train or efficient_scale"
    )


def grown_header(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int,
  name: str,
  path: str,
  checked: Check | None = None,
) -> StoredModel:
  """What `scale_up` makes of a model but for its arrays: shapes of parameters.

  Args and errors are those of `scale_up`; `checked` is what `checking.check`
  measured.
  """
  plan = plan_growth(source.config, target, options, seed=seed, path=path)
  return _header(source, plan, options, seed=seed, name=name, checked=checked)


def _header(
  source: StoredModel,
  plan: Plan,
  options: ScaleUp,
  *,
  seed: int,
  name: str,
  checked: Check | None = None,
) -> StoredModel:
  event = Event(
    kind="scale_up",
    name=name,
    parent=options.source,
    options=config_lib.to_dict(options) | {"seed": seed},
    new_indices=plan.new_indices,
    growth=plan.to_json()
    | ({"check": dataclasses.asdict(checked)} if checked else {}),
    copies=plan.copies,
  )
  return dataclasses.replace(
    source,
    config=plan.config,
    lineage=source.lineage.then(event),
    params=decoder_lm.abstract_params(plan.config),
    moments=None,
    ema=None,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a growth will do, in words and numbers, before it does it."""

  method: str
  growth: Growth | None  # None where nothing of the source is kept
  config: ModelConfig  # of the grown model
  exactness: Exactness
  axes: dict[str, str]  # of each that grows: where it comes from
  new_indices: dict[str, list[list[int]]]
  copies: dict[str, list[list[int]]]  # the maps, for lineage.Event.copies
  parameters: tuple[int, int]  # before and after

  def to_json(self) -> dict[str, Any]:
    """For the lineage."""
    return {
      "method": self.method,
      **self.exactness.to_json(),
      "axes": self.axes,
      "parameters": list(self.parameters),
    }

  def lines(self) -> Iterator[str]:
    """For people."""
    before, after = self.parameters
    yield (
      f"{self.method}: {before:,} -> {after:,} parameters"
      f" (x{after / before:.2f})"
    )
    yield f"predicted {self.exactness.in_words()}"
    for name, words in self.axes.items():
      yield f"  {name}: {words}"


def plan_growth(
  source: ModelConfig,
  target: ModelConfig,
  options: ScaleUp,
  *,
  seed: int = 0,
  path: str = "config.model",
) -> Plan:
  """Says what `scale_up` would do.

  Args and errors are those of `make_growth`; any method will do.
  """
  parameters = (num_parameters(source), num_parameters(target))
  if options.method == "random":
    check_pair(source, target, options, path=path)
    # Every leaf has one of these two.
    everything = {"embed": target.embed_dim, "head_dim": target.head_dim}
    return Plan(
      method="random",
      growth=None,
      config=target,
      exactness=Exactness(
        exact=False, reasons=("nothing of the source's parameters is kept",)
      ),
      axes={},
      copies={},
      new_indices={axis: [[0, size]] for axis, size in everything.items()},
      parameters=parameters,
    )
  growth = make_growth(source, target, options, seed=seed, path=path)
  words = {
    name: growth.layers.in_words() if name == "layer" else g.in_words()
    for name, g in growth.maps.items()
    if not g.is_identity
  }
  return Plan(
    method=options.method,
    growth=growth,
    config=growth.config(source, target),
    exactness=predict(growth, source, target),
    axes=words,
    new_indices=growth.new_indices,
    copies=axis_map.copies(growth.width),
    parameters=parameters,
  )


def model_leaves(
  config: ModelConfig, *, role: str = "params"
) -> dict[str, LeafSpec]:
  """The leaves of a tree of a MODEL; but for the parameters they are wide.

  Args:
    config: of the model.
    role: a key of `POWERS`.

  Returns:
    The leaves by name.
  """
  shapes = decoder_lm.abstract_params(config)
  leaves = leaf_specs(decoder_lm.parameter_axes(config), shapes)
  if role == "params":
    return leaves
  return {
    name: dataclasses.replace(
      leaf, dtype=jnp.dtype(dtypes.at_least_float32(leaf.dtype))
    )
    for name, leaf in leaves.items()
  }


def model_sizes(config: ModelConfig) -> dict[str, int]:
  """The size of every axis of a model, by name."""
  return axis_map.axis_sizes(
    decoder_lm.parameter_axes(config), decoder_lm.abstract_params(config)
  )


def num_parameters(config: ModelConfig) -> int:
  """Of all leaves."""
  shapes = jax.tree.leaves(decoder_lm.abstract_params(config))
  return sum(math.prod(leaf.shape) for leaf in shapes)


def _difference(name: str, given: Any, needed: Any) -> tuple[str, Any, Any]:
  """Where two values differ: of two sections their first field that does."""
  if type(given) is not type(needed) or not dataclasses.is_dataclass(given):
    return name, given, needed
  for field in dataclasses.fields(given):
    one, other = (getattr(value, field.name) for value in (given, needed))
    if one != other:
      return f"{name}.{field.name}", one, other
  raise AssertionError("they are the same")


def _shown(value: Any) -> str:
  if isinstance(value, MoeConfig):
    return f"({value.num_experts} experts)"
  is_section = dataclasses.is_dataclass(value)
  return repr(config_lib.to_dict(value)) if is_section else repr(value)
