"""What an upcycling does to the function, derived from its numbers.

Identical experts, or shards of them that are always met together, give the
dense FFN where what they are multiplied by sums to one. As in exactness.py this
is a rule and no list of methods.
"""

from __future__ import annotations

import math

import numpy as np

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth.exactness import Exactness
from aquila_jax.growth.upcycling import Upcycling


def predict(
  upcycling: Upcycling, source: ModelConfig, target: ModelConfig
) -> Exactness:
  """Whether an upcycling keeps the function.

  Args:
    upcycling: what every FFN is made of.
    source: the architecture before.
    target: the architecture after.

  Returns:
    The prediction, with its reasons.
  """
  reasons = [
    *_routing_reasons(upcycling),
    *_gate_reasons(upcycling),
    *_copy_reasons(upcycling),
  ]
  notes = []
  rounds = not all(map(_rounds_nothing, _scales(upcycling)))
  if target.param_dtype == "bfloat16" and rounds:
    notes.append("kernels that are multiplied are rounded to bfloat16")
  if upcycling.moe.is_noisy and upcycling.together > 1:
    notes.append(
      "in training the router's noise tells apart what is met together"
    )
  if source.param_dtype != target.param_dtype:
    notes.append(f"parameters are cast to {target.param_dtype}")
  return Exactness(
    exact=not reasons, reasons=tuple(reasons), notes=tuple(notes)
  )


def _scales(up: Upcycling) -> list[float]:
  """What outputs of experts are multiplied by, but for what is measured."""
  scales = up.routed_scale(np.ones(len(up.layers))).tolist()
  return scales if up.shared is None else [*scales, up.shared_scale]


def _rounds_nothing(scale: float) -> bool:
  return math.frexp(scale)[0] == 0.5  # a power of two


def _routing_reasons(up: Upcycling) -> list[str]:
  moe = up.moe
  if not moe.is_causal:
    return ["experts choose tokens, so that a token meets few or many of them"]
  reasons, together = [], up.together
  if up.of_source is not None:
    needed = together * up.of_source.top_k
    if moe.top_k != needed:
      reasons.append(
        f"top_k={moe.top_k} where {needed} meet all copies of the experts that"
        " the source would choose; on ties the first copies are met"
      )
  elif moe.top_k % together:
    reasons.append(
      f"top_k={moe.top_k} is no multiple of the {together} shards of a copy, of"
      " which some are left out"
    )
  limited = moe.top_groups < moe.num_groups
  if limited and (moe.num_experts // moe.num_groups) % together:
    reasons.append(
      f"num_groups={moe.num_groups} cut through the {together} experts that are"
      " to be met together"
    )
  if limited and up.of_source is not None and moe.group_score == "top2_sum":
    reasons.append(
      "group_score='top2_sum' counts the two best of a group, which are copies"
      " of one"
    )
  capacity = moe.capacity_factor
  if capacity is not None and capacity * moe.top_k < moe.num_experts:
    reasons.append(
      f"capacity_factor={capacity:g}: what does not fit into an expert is"
      " dropped"
    )
  return reasons


def _gate_reasons(up: Upcycling) -> list[str]:
  moe = up.moe
  if up.of_source is not None or up.gate_sum is not None or not moe.is_causal:
    return []
  return [
    "gates sum to something else for every token (no renormalise), and no"
    " constant makes up for it"
  ]


def _copy_reasons(up: Upcycling) -> list[str]:
  reasons = []
  if up.num_models > 1:
    reasons.append(
      f"{up.num_models} models give experts, and the rest is their mean"
    )
  if up.redraw:
    reasons.append(f"{100 * up.redraw:g} % of the hidden units are drawn anew")
  if up.noise:
    reasons.append(
      f"noise of {up.noise:g} standard deviations is added to"
      f" {100 * up.noise_share:g} % of the entries"
    )
  if up.scales_all and not _scales_nothing(up):
    reasons.append("a cube root in gate, up and down is no factor of SwiGLU")
  return reasons


def _scales_nothing(up: Upcycling) -> bool:
  return not up.needs_constant and all(scale == 1 for scale in _scales(up))
