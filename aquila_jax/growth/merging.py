"""From a mixture back to one FFN a layer: the mean of its experts.

Experts that are the same give the dense FFN that they are; of others the mean
is a guess, as is that of models (model soups, Wortsman et al., arXiv
2203.05482). Weighted by usage, an expert counts by the share of the assignments
that it gets on a text. A shared expert without a gate keeps its units, which
stand before those of the mean.
"""

from __future__ import annotations

import dataclasses

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.growth.exactness import Exactness
from aquila_jax.growth.methods import option
from aquila_jax.growth.upcycling import check_kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merging:
  """What the one FFN is made of."""

  moe: MoeConfig  # of the source
  layers: tuple[int, ...]  # that have experts
  by_usage: bool


def make_merging(
  source: ModelConfig, target: ModelConfig, options: ScaleOut, *, path: str
) -> Merging:
  """The way from a mixture to a dense model.

  Args:
    source: with `moe`.
    target: without.
    options: the method.
    path: the dotted name of `target`, for messages.

  Returns:
    The merging.

  Raises:
    errors.UserError: where there is none, naming the field.
  """
  check_kept(source, target, path=path)
  what = option(path, "method")
  if source.moe is None:
    raise errors.UserError(
      f"{what}={options.method!r}: the source is dense; expected a mixture"
    )
  if target.moe is not None:
    raise errors.UserError(
      f"{path}.moe: expected None; method={options.method!r} makes one FFN of"
      " all experts"
    )
  moe = source.moe
  if moe.shared_expert_dim and moe.shared_expert_gate:
    raise errors.UserError(
      f"{what}={options.method!r}: the source's shared expert has a gate"
      " (moe.shared_expert_gate), and no dense FFN can hold one"
    )
  width = source.mlp_dim + moe.shared_expert_dim
  if target.mlp_dim != width:
    raise errors.UserError(
      f"{path}.mlp_dim={target.mlp_dim}: expected {width}, the hidden units of"
      " an expert" + (" and of the shared one" if moe.shared_expert_dim else "")
    )
  if source.is_mixed and source.dense_mlp_dim != width:
    raise errors.UserError(
      f"{what}={options.method!r}: the source's layers without experts have"
      f" {source.dense_mlp_dim} hidden units (moe.dense_mlp_dim); expected"
      f" {width}, those of a merged FFN, since all layers of a dense model have"
      " as many"
    )
  return Merging(
    moe=moe,
    layers=source.moe_layers,
    by_usage=options.method == "merge_by_usage",
  )


def predict(
  merging: Merging, source: ModelConfig, target: ModelConfig
) -> Exactness:
  """Whether a merging keeps the function: only of experts that are the same."""
  notes = ["it is exact where all experts of a layer are the same"]
  if not merging.moe.gates_sum_to_one:
    notes = ["gates do not sum to one, and an FFN counts whole"]
  if source.param_dtype != target.param_dtype:
    notes.append(f"parameters are cast to {target.param_dtype}")
  return Exactness(
    exact=False,
    reasons=(f"{merging.moe.num_experts} experts become their mean",),
    notes=tuple(notes),
  )
