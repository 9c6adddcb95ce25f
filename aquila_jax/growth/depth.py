"""Depth: which source layer every target layer copies."""

from __future__ import annotations

import numpy as np

from aquila_jax.core.experiment_config import DepthRule
from aquila_jax.growth.axis_map import AxisMap


def interpolate(num_source: int, num_target: int) -> AxisMap:
  """Target layer l copies source layer floor(l L_src / L_tgt).

  A layer stands beside its copy: 32 -> 40 doubles 0, 4, 8, ..., 28. (AquilaMoE,
  section 2.2, where the formula is misprinted.)
  """
  return AxisMap(np.arange(num_target) * num_source // num_target, num_source)


def stack(num_source: int, num_target: int) -> AxisMap:
  """Target layer l copies source layer l mod L_src: the source upon itself."""
  return AxisMap(np.arange(num_target) % num_source, num_source)


_RULES = {"interpolate": interpolate, "stack": stack}


def depth_map(rule: DepthRule, num_source: int, num_target: int) -> AxisMap:
  """The map of the `layer` axis by the rule's name."""
  return _RULES[rule](num_source, num_target)
