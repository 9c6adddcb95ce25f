"""From counts to what a person asks of a routing: load, languages, pairs.

A load f is a distribution over E experts: the shares of all assignments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from aquila_jax.evaluation.routing.counts import RoutingCounts
from aquila_jax.evaluation.routing.token_text import CLASSES

_EXAMPLES = 6  # of a class


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRouting:
  """What is said of one layer. E experts, J classes, K domains with text."""

  layer: int  # of the model
  load: np.ndarray  # float [E]; shares of the assignments
  domain_load: np.ndarray  # float [K E]; likewise, of each domain
  class_load: np.ndarray  # float [J E]; likewise, of each class
  together: np.ndarray  # int [E E]; see RoutingCounts
  load_entropy: float  # nats; log E when even
  router_entropy: float  # nats; of a token's probabilities, the mean
  top_gate: float  # of a token, the mean
  router_z: float  # mean logsumexp(router logits)^2
  dropped: float  # share of assignments; of tokens, where experts choose
  over_capacity: float | None  # None without a capacity

  @property
  def relative_load(self) -> Float[np.ndarray, "E"]:
    """In multiples of an even share."""
    return self.load * len(self.load)

  @property
  def max_over_mean(self) -> float:
    return float(self.relative_load.max())

  def dead(self, below: float) -> list[int]:
    """The experts whose load is below that fraction of an even share."""
    return np.flatnonzero(self.relative_load < below).tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClass:
  """A class of tokens that the text has."""

  name: str
  tokens: int  # that were read
  distinct: int
  examples: tuple[int, ...]  # those that occurred most often


def classes_of(
  counts: RoutingCounts, class_of: Mapping[int, str]
) -> list[TokenClass]:
  """The classes that occurred, in the order of `CLASSES`.

  Args:
    counts: of the text.
    class_of: of each token that occurred.
  """
  # The most frequent first.
  order = np.argsort(-counts.occurrences, kind="stable")
  seen = order[counts.occurrences[order] > 0].tolist()
  found = []
  for name in CLASSES:
    members = [token for token in seen if class_of[token] == name]
    if members:
      found.append(
        TokenClass(
          name=name,
          tokens=int(counts.occurrences[members].sum()),
          distinct=len(members),
          examples=tuple(members[:_EXAMPLES]),
        )
      )
  return found


def layers_of(
  counts: RoutingCounts,
  *,
  classes: Sequence[str],
  class_of: Mapping[int, str],
) -> list[LayerRouting]:
  """What is said of every layer that has experts.

  Args:
    counts: of the text.
    classes: names of the J classes.
    class_of: see `classes_of`.

  Returns:
    The layers, from the bottom up.
  """
  number = {name: i for i, name in enumerate(classes)}
  index = np.zeros(len(counts.occurrences), np.int64)
  for token, name in class_of.items():
    index[token] = number[name]
  return [
    _layer(counts, row, index=index, num_classes=len(classes))
    for row in range(len(counts.layers))
  ]


def _layer(
  counts: RoutingCounts,
  row: int,
  *,
  index: Int[np.ndarray, "V"],
  num_classes: int,
) -> LayerRouting:
  """One layer; `index` is the class of each token."""
  tokens, experts, met = counts.token_experts[row].entries()
  by_class = np.zeros((num_classes, counts.num_experts), np.int64)
  np.add.at(by_class, (index[tokens], experts), met)
  load = shares(counts.load[row].sum(0))

  def mean(name: str) -> float:
    return float(counts.mean(name)[row])

  return LayerRouting(
    layer=counts.layers[row],
    load=load,
    domain_load=shares(counts.load[row][counts.domain_tokens > 0]),
    class_load=shares(by_class),
    together=counts.together[row],
    load_entropy=entropy(load),
    router_entropy=mean("entropy"),
    top_gate=mean("top_gate"),
    router_z=mean("z_loss"),
    dropped=mean("dropped"),
    over_capacity=None if counts.capacity_factor is None else mean("over"),
  )


def shares(counts: Int[np.ndarray, "*rows E"]) -> Float[np.ndarray, "*rows E"]:
  """Counts over their sum; zeros where there is none."""
  totals = counts.sum(-1, keepdims=True)
  return counts / np.maximum(totals, 1)


def entropy(load: Float[np.ndarray, "E"]) -> float:
  """Nats."""
  positive = load[load > 0]
  return float(-np.sum(positive * np.log(positive)) + 0.0)


def distance(
  one: Float[np.ndarray, "E"], other: Float[np.ndarray, "E"]
) -> float:
  """Total variation, 0 to 1: the share of one that would have to move."""
  return float(np.abs(one - other).sum() / 2)


def chance_distance(
  load: Float[np.ndarray, "E"], counts: tuple[int, int]
) -> float:
  """The mean distance of two samples of one load.

  Each expert's share in n draws has the variance f (1 - f) / n, and the mean
  of |x| of a normal x is its deviation times sqrt(2 / pi). Tokens of a text
  are no independent draws, so that this is the least to expect.

  Args:
    load: f.
    counts: draws of the two samples.
  """
  if not all(counts):
    return 0.0
  variance = load * (1 - load) * sum(1 / n for n in counts)
  return float(np.sqrt(variance / (2 * np.pi)).sum())


def pair_lift(
  together: Int[np.ndarray, "E E"],
) -> Float[np.ndarray, "E E"]:
  """How often two experts are met together, over what their loads explain.

  What loads explain is the product of the two, times a factor that makes the
  sum over all pairs what it is: a token does not meet an expert twice, so the
  product itself would be too large.

  Args:
    together: see RoutingCounts.

  Returns:
    1 where loads explain it; NaN on the diagonal and where an expert has none.
  """
  load = np.diag(together).astype(np.float64)
  off = ~np.eye(len(load), dtype=bool)
  expected = np.outer(load, load)
  total = expected[off].sum()
  met = together[off].sum()
  lift = np.full(together.shape, np.nan)
  if total > 0 and met > 0:
    known = off & (expected > 0)
    lift[known] = together[known] / (expected[known] * met / total)
  return lift
