"""Means over the seeds, differences within them, and curves."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Results = dict[str, Any]
# Tokens or FLOPs, and loss.
Curve = list[list[float]]

# Quantiles at 97.5 % of Student's t, with 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL = 1.960  # below the quantile of more; an interval is a little narrow


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

  @property
  def deviation(self) -> float | None:
    """The standard deviation, over n - 1; None of one seed."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None

  @property
  def interval(self) -> tuple[float, float] | None:
    """Where the mean lies at 95 % confidence, by Student's t; None of one seed.

    It takes the seeds as draws from a normal distribution.
    """
    if self.deviation is None:
      return None
    count = len(self.values)
    quantile = _T[count - 2] if count - 2 < len(_T) else _NORMAL
    reach = quantile * self.deviation / math.sqrt(count)
    return self.mean - reach, self.mean + reach

  def in_words(self) -> str:
    """The mean, and half of the range where there are several seeds."""
    if len(self.values) < 2:
      return fixed(self.mean)
    return f"{fixed(self.mean)} ± {self.half_range:.3f}"

  def with_deviation(self) -> str:
    """The mean, and the standard deviation where there are several seeds."""
    if self.deviation is None:
      return fixed(self.mean)
    return f"{fixed(self.mean)} ± {self.deviation:.3f}"

  def with_interval(self) -> str:
    """The mean, its deviation, and its interval, as of a difference."""
    if self.interval is None:
      return fixed(self.mean, sign=True)
    low, high = (fixed(end, sign=True) for end in self.interval)
    mean = fixed(self.mean, sign=True)
    return f"{mean} ± {self.deviation:.3f} [{low}, {high}]"


def fixed(value: float, *, sign: bool = False) -> str:
  """Three decimals, and no -0.000."""
  return f"{round(value, 3) + 0.0:{'+' if sign else ''}.3f}"


def spread(values: Sequence[float]) -> Spread | None:
  return Spread(values=tuple(values)) if values else None


def paired(
  values: Mapping[str, float], others: Mapping[str, float]
) -> Spread | None:
  """The differences of the seeds that both have; None where there are none."""
  return spread([values[s] - others[s] for s in values if s in others])


def curves(results: Results, arm: str) -> dict[str, Curve]:
  """The validation curves of an arm, by seed."""
  return {
    seed: found["stages"][arm]["curve"]
    for seed, found in results["seeds"].items()
    if arm in found["stages"]
  }


def loss_at(results: Results, arm: str, place: float) -> Spread | None:
  """The losses of an arm at a validation, a seed each."""
  return spread(
    [
      loss
      for curve in curves(results, arm).values()
      for at, loss in curve
      if at == place
    ]
  )


def mean_curve(of_seeds: Sequence[Curve]) -> Curve:
  """The mean at the validations that all of the curves have."""
  return [
    [points[0][0], sum(loss for _, loss in points) / len(points)]
    for points in zip(*of_seeds, strict=False)
  ]
