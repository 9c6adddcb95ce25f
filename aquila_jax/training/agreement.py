"""How far routing has settled: whether tokens still meet the same experts.

On a standing text, the share of the assignments that a token had at the last
checkpoint already; OLMoE (arXiv 2409.02060, section 5.1) measures so against
the end of training, which nobody has while it lasts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from aquila_jax.core.types import Params
from aquila_jax.training.metrics import Row

# From parameters to the experts of the tokens of the text, [L B T A] of the
# layers with experts; -1 is none.
Route = Callable[[Params], Int[np.ndarray, "L B T A"]]


def agreement(
  before: Int[np.ndarray, "L B T A"], after: Int[np.ndarray, "L B T A"]
) -> Float[np.ndarray, "L"]:
  """The share of the assignments of `after` that were there before, a layer."""
  is_same = before[..., :, None] == after[..., None, :]
  is_one = after >= 0
  kept = (is_same.any(-2) & is_one).sum((1, 2, 3))
  return kept / np.maximum(is_one.sum((1, 2, 3)), 1)


@dataclasses.dataclass(kw_only=True)
class RoutingWatch:
  """Compares each checkpoint with the one before it.

  Attributes:
    route: where the tokens of the text go.
    layers: which layers of the model have experts, in rising order.
    step: of the last checkpoint, or of the start.
    experts: of that step.
  """

  route: Route
  layers: Sequence[int]
  step: int
  experts: Int[np.ndarray, "L B T A"]

  @classmethod
  def start(
    cls, route: Route, params: Params, *, layers: Sequence[int], step: int
  ) -> RoutingWatch:
    """From the parameters that training goes on from."""
    return cls(route=route, layers=layers, step=step, experts=route(params))

  def row(self, step: int, params: Params) -> Row:
    """What has changed until `step`, which is compared with from then on.

    Args:
      step: of the checkpoint.
      params: of that step.

    Returns:
      A row of routing.jsonl; agreement is over the layers of the model, None
      where one has no experts.
    """
    experts = self.route(params)
    shares = agreement(self.experts, experts).tolist()
    found = dict(zip(self.layers, shares, strict=True))
    row = {
      "step": step,
      "since_step": self.step,
      "agreement": [found.get(i) for i in range(self.layers[-1] + 1)],
    }
    self.step, self.experts = step, experts
    return row
