"""Scale-Out: a mixture of experts from a dense model, or from a smaller one.

  sparse_upcycling   every expert is a copy of the FFN, the router is drawn from
                     N(0, router_init_std^2) (Komatsuzaki et al., arXiv
                     2212.05055; AquilaMoE, section 2.3).
  granular           an FFN is cut into shards and each is copied: as many
                     shards as the target's mlp_dim goes into the source's
                     (virtual groups, He et al., arXiv 2410.07524, section 3.2).
  drop_upcycling     half of an expert's hidden units are drawn anew, each
                     expert its own half (Nakamura et al., arXiv 2502.19261,
                     section 3).
  noise              noise on half of the entries.
  branch_train_mix   the experts are the FFNs of several models, all else their
                     mean (Sukhbaatar et al., arXiv 2403.07816, section 3.2).
  average            of a mixture one FFN: the mean of its experts.
  merge_by_usage     likewise, weighted by how many tokens of a text each gets.

All but the last three also make a mixture larger: each expert is copied. Cuts,
what is drawn anew, noise and a shared expert go together in any way. A method
is the numbers in upcycling.py, which say what becomes of an FFN; whether the
function is kept is derived from them (upcycling_exactness.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import MERGING_METHODS, ScaleOut
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig, differences
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.growth import checking, merging, upcycling_exactness
from aquila_jax.growth.calibration import Calibration, calibrate
from aquila_jax.growth.exactness import Check, Exactness
from aquila_jax.growth.grown_tree import (
  ArrayTree,
  Tree,
  materialise,
)
from aquila_jax.growth.merging import Merging, make_merging
from aquila_jax.growth.routers import Sample
from aquila_jax.growth.scale_up import model_leaves, num_parameters
from aquila_jax.growth.upcycled_tree import MergedTree, UpcycledTree
from aquila_jax.growth.upcycling import Upcycling, make_upcycling
from aquila_jax.models import decoder_lm

# A tree of each of the roles of scale_up.POWERS, where a model has it.
Trees = Mapping[str, Tree | None]
# Of the names of moments in the store of an optimizer's state.
Prefixes = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a Scale-Out will do, in words and numbers, before it does it."""

  method: str
  way: Upcycling | Merging
  config: ModelConfig  # of the target
  exactness: Exactness
  parameters: tuple[int, int]  # before and after

  def to_json(self) -> dict[str, Any]:
    """For the lineage."""
    return {
      "method": self.method,
      **self.exactness.to_json(),
      "experts": self.in_words(),
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
    yield f"  {self.in_words()}"

  def in_words(self) -> str:
    """What an FFN is made of."""
    if isinstance(self.way, Merging):
      return f"an FFN is the mean of {self.way.moe.num_experts} experts"
    return self.way.in_words()


def plan_scale_out(
  source: ModelConfig,
  target: ModelConfig,
  options: ScaleOut,
  *,
  path: str = "config.model",
) -> Plan:
  """Says what `scale_out` would do.

  Args:
    source: a dense architecture, or a mixture.
    target: what is wanted.
    options: the method and its options.
    path: the dotted name of `target`, for messages.

  Returns:
    The plan.

  Raises:
    errors.UserError: where there is no such way; it names the field.
  """
  if options.method in MERGING_METHODS:
    way = make_merging(source, target, options, path=path)
    exactness = merging.predict(way, source, target)
  else:
    way = make_upcycling(source, target, options, path=path)
    exactness = upcycling_exactness.predict(way, source, target)
  return Plan(
    method=options.method,
    way=way,
    config=target,
    exactness=exactness,
    parameters=(num_parameters(source), num_parameters(target)),
  )


def scale_out(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleOut,
  *,
  others: Sequence[StoredModel] = (),
  sample: Sample | None = None,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
  shardings: Any = None,
) -> StoredModel:
  """Makes a mixture of a model, or one FFN of the experts of a mixture.

  Args:
    source: the model; it is not changed.
    target: the architecture to make.
    options: the method, its options, and whether moments go along.
    others: the models of `options.sources`.
    sample: text for what is measured; needed where `calibration` says so.
    seed: of what is drawn.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.
    shardings: a tree of NamedSharding, shaped as the target's parameters: where
      these, average and moments are to lie. None leaves it to JAX.

  Returns:
    The mixture, in the target's parameter dtype; its lineage has one more
    event, which says what was kept.

  Raises:
    errors.UserError: where the source cannot become the target.
  """
  plan = plan_scale_out(source.config, target, options, path=path)
  models = (source, *others)
  trees = [_array_trees(model, options) for model in models]
  calibration = calibrate(
    plan.way,
    checking.ReadModel(config=source.config, params=_params(trees[0])),
    target,
    options,
    sample=sample,
    seed=seed,
    path=path,
  )
  header = grown_header(
    source,
    plan,
    options,
    calibration=calibration,
    seed=seed,
    name=name,
    mixed=[model.lineage for model in others],
  )
  made = scaled_out_trees(
    plan, [m.config for m in models], trees, calibration=calibration, seed=seed
  )
  by_leaf = None
  if shardings is not None:
    names = model_leaves(target)
    by_leaf = dict(zip(names, jax.tree.leaves(shardings), strict=True))

  def whole(role: str) -> Any:
    if role not in made:
      return None
    leaves = model_leaves(target, role=role)
    return materialise(made[role], leaves, shardings=by_leaf)

  moments = None
  if "mu" in made:
    assert source.moments is not None
    moments = AdamMoments(
      count=source.moments.count, mu=whole("mu"), nu=whole("nu")
    )
  return dataclasses.replace(
    header, params=whole("params"), moments=moments, ema=whole("ema")
  )


def _array_trees(model: StoredModel, options: ScaleOut) -> Trees:
  moments = model.moments if options.optimizer == "grow" else None
  trees = {
    "params": model.params,
    "ema": model.ema,
    "mu": None if moments is None else moments.mu,
    "nu": None if moments is None else moments.nu,
  }
  return {
    role: None if tree is None else ArrayTree(tree)
    for role, tree in trees.items()
  }


def _params(trees: Trees) -> Tree:
  tree = trees["params"]
  assert tree is not None
  return tree


def grown_header(
  source: StoredModel,
  plan: Plan,
  options: ScaleOut,
  *,
  calibration: Calibration,
  seed: int,
  name: str,
  mixed: Sequence[Lineage] = (),
  checked: Check | None = None,
) -> StoredModel:
  """What `scale_out` makes but for its arrays: shapes of parameters.

  Args:
    source: the model that grows.
    plan: of `plan_scale_out`.
    options: the method and its options.
    calibration: what was measured.
    seed: of what was drawn.
    name: of the stage.
    mixed: of the models that are mixed in; their training counts as well.
    checked: what `checking.check` measured.

  Returns:
    The model without arrays.
  """
  moe, growth = plan.config.moe, plan.to_json()
  constants = calibration.constants
  if constants is not None:
    growth["constants"] = {
      "values": constants.values.tolist(),
      "errors": constants.errors.tolist(),
    }
  if checked is not None:
    growth["check"] = dataclasses.asdict(checked)
  # What the source and the others went through together counts once.
  others = [
    event
    for lineage in mixed
    for event in lineage.events
    if event not in source.lineage.events
  ]
  event = Event(
    kind="scale_out",
    tokens=sum(other.tokens for other in others),
    flops=sum((other.flops for other in others), 0.0),
    name=name,
    parent=options.source,
    options=config_lib.to_dict(options)
    | {"seed": seed, "moe": None if moe is None else config_lib.to_dict(moe)},
    growth=growth,
  )
  return dataclasses.replace(
    source,
    config=plan.config,
    lineage=source.lineage.then(event),
    params=decoder_lm.abstract_params(plan.config),
    moments=None,
    ema=None,
  )


def scaled_out_trees(
  plan: Plan,
  configs: Sequence[ModelConfig],
  trees: Sequence[Trees],
  *,
  calibration: Calibration,
  seed: int,
  prefixes: Prefixes | None = None,
) -> dict[str, Tree]:
  """The trees of the target, made as they are read.

  Args:
    plan: of `plan_scale_out`.
    configs: of the source and of those mixed in.
    trees: likewise.
    calibration: of `calibrate`.
    seed: of what is drawn.
    prefixes: by role, of the names in `trees`.

  Returns:
    By role, those that all models have.

  Raises:
    errors.UserError: where a model that is mixed in is of another architecture.
  """
  for number, config in enumerate(configs[1:]):
    check_same(configs[0], config, what=f"sources[{number}]")
  roles = [r for r in trees[0] if all(t[r] is not None for t in trees)]
  if isinstance(plan.way, Merging):
    return {
      role: _merged(plan, configs[0], trees[0], role, calibration=calibration)
      for role in roles
    }
  kernels = _kernels(configs[0], "expert" if plan.way.of_source else "mlp")
  constants = calibration.constants
  return {
    role: UpcycledTree(
      [_present(t[role]) for t in trees],
      plan.way,
      role=role,
      leaves=model_leaves(plan.config, role=role),
      kernels=kernels,
      rows=calibration.rows,
      constants=None if constants is None else constants.values,
      seed=seed,
      prefix=(prefixes or {}).get(role, ""),
      values=[_params(t) for t in trees] if role == "ema" else None,
    )
    for role in roles
  }


def _merged(
  plan: Plan,
  source: ModelConfig,
  trees: Trees,
  role: str,
  *,
  calibration: Calibration,
) -> MergedTree:
  way = plan.way
  assert isinstance(way, Merging)
  weights = calibration.usage
  if weights is None:
    count = way.moe.num_experts
    weights = np.full((len(way.layers), count), 1 / count)
  shared = way.moe.shared_expert_dim
  return MergedTree(
    _present(trees[role]),
    weights,
    leaves=model_leaves(plan.config, role=role),
    old=model_leaves(source),
    experts=_kernels(source, "expert"),
    shared=_kernels(source, "shared_mlp") if shared else None,
  )


def _present(tree: Tree | None) -> Tree:
  assert tree is not None
  return tree


def _kernels(config: ModelConfig, axis: str) -> dict[str, str]:
  """The kernels of an FFN, by the last part of their names.

  Args:
    config: of the source.
    axis: that they have and that is not the router's.
  """
  return {
    name.rpartition(".")[2]: name
    for name, spec in model_leaves(config).items()
    if spec.axes.has(axis) and not spec.axes.has("expert", Role.WRITES)
  }


def check_same(source: ModelConfig, other: ModelConfig, *, what: str) -> None:
  """Refuses to mix models of several architectures.

  Args:
    source: of the model that grows.
    other: of one that is mixed in.
    what: names the other, for messages.

  Raises:
    errors.UserError: naming the field.
  """
  for name, given, needed in differences(other, source):
    raise errors.UserError(
      f"{what}: its {name} is {given!r}, the source's {needed!r};"
      " expected models of one architecture"
    )
