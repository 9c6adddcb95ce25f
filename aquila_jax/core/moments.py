"""Adam's moments: the part of the optimizer state that models carry along."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import struct

from aquila_jax.core.types import Leaf, Params


class AdamMoments(struct.PyTreeNode):
  """First and second moments, shaped as the parameters, and the step count."""

  count: Leaf  # int []
  mu: Params
  nu: Params


def _is_adam(node: Any) -> bool:
  return isinstance(node, optax.ScaleByAdamState)


def get_moments(opt_state: Any) -> AdamMoments:
  """The moments inside an optax state; there is exactly one set of them."""
  nodes = jax.tree.leaves(opt_state, is_leaf=_is_adam)
  found = [node for node in nodes if _is_adam(node)]
  assert len(found) == 1, f"{len(found)} ScaleByAdamState in the state"
  return AdamMoments(count=found[0].count, mu=found[0].mu, nu=found[0].nu)


def set_moments(opt_state: Any, moments: AdamMoments) -> Any:
  """`opt_state` with its Adam moments and count replaced."""
  adam = optax.ScaleByAdamState(
    count=moments.count, mu=moments.mu, nu=moments.nu
  )
  return jax.tree.map(
    lambda node: adam if _is_adam(node) else node, opt_state, is_leaf=_is_adam
  )
