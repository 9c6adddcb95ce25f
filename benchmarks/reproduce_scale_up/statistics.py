"""Means over the seeds, and what is to be seen in them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

Results = dict[str, Any]
Curve = list[list[float]]  # tokens and loss, from before the first step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
  """A number of each seed."""

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    return statistics.fmean(self.values)

  @property
  def half_range(self) -> float:
    return (max(self.values) - min(self.values)) / 2

  def in_words(self) -> str:
    """The mean, and half of the range where there are several seeds."""
    mean = f"{round(self.mean, 3) + 0.0:.3f}"  # no -0.000
    if len(self.values) < 2:
      return mean
    return f"{mean} ± {self.half_range:.3f}"


def initial(results: Results, size: str, method: str) -> list[dict[str, Any]]:
  """The rows of one size and method, a seed each."""
  return [
    row
    for seed in results["seeds"].values()
    for row in seed["initial"]
    if (row["size"], row["method"]) == (size, method)
  ]


def initial_loss(results: Results, size: str, method: str) -> Spread | None:
  rows = initial(results, size, method)
  return spread([row["loss"] for row in rows])


def spread(values: Sequence[float]) -> Spread | None:
  return Spread(values=tuple(values)) if values else None


def curves(results: Results, arm: str) -> dict[str, Curve]:
  """The validation curves of an arm, by seed."""
  return {
    seed: found["stages"][arm]["curve"]
    for seed, found in results["seeds"].items()
    if arm in found["stages"]
  }


def loss_at(results: Results, arm: str, tokens: float) -> Spread | None:
  """The losses of an arm at a validation, a seed each."""
  return spread(
    [
      loss
      for curve in curves(results, arm).values()
      for at, loss in curve
      if at == tokens
    ]
  )


def overtaken_at(arm: Curve, other: Curve) -> float | None:
  """From which validation on the loss of `arm` is below that of `other`.

  Args:
    arm: tokens and loss.
    other: at the same numbers of tokens.

  Returns:
    Tokens at the first validation from which on it stays below; None where it
    is not below at the last.
  """
  below = None
  for (tokens, loss), (_, others) in zip(arm, other, strict=True):
    if loss >= others:
      below = None
    elif below is None:
      below = tokens
  return below
