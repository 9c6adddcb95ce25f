"""Where training from scratch reaches the loss of an arm.

Measured where its curve gets there. Beyond its end a fit says so, of

  loss(f) = E + B f^-b        with E >= 0, B > 0

over the FLOPs f of the second half of the curve: least squares in E and B for
every b of a grid. Its interval is that of a bootstrap of the residuals. The
curve's last part has a falling learning rate, so the fit falls rather too fast.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from benchmarks.reproduction.statistics import Curve

# Beyond so many times the FLOPs of the curve no fit is believed.
FARTHEST = 3.0
_EXPONENTS = np.linspace(0.05, 2.0, 40)
_RESAMPLES = 200
_LEAST_POINTS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Catch:
  """FLOPs at which a loss is reached; None where it is not, nor by a fit."""

  flops: float | None
  # 95 % of the resamples of a fit, whose upper end may be infinite; None where
  # it was measured.
  interval: tuple[float, float] | None = None

  def in_words(self, unit: float) -> str:
    """In multiples of `unit`; "" where it is not reached."""
    if self.flops is None:
      return ""
    times = f"{self.flops / unit:.2f}"
    if self.interval is None:
      return times
    low, high = (end / unit for end in self.interval)
    upper = "any" if math.isinf(high) else f"{high:.2f}"
    return f"{times}, extrapolated ({low:.2f} to {upper})"


def caught_up(curve: Curve, loss: float) -> Catch:
  """Where a curve reaches a loss.

  Args:
    curve: FLOPs and loss, from scratch.
    loss: to be reached.

  Returns:
    Where it is reached first: measured, or else by the fit.
  """
  measured = reached(curve, loss)
  if measured is not None:
    return Catch(flops=measured)
  last = curve[-1][0]
  late = np.asarray([p for p in curve if p[0] >= last / 2], np.float64)
  if len(late) < _LEAST_POINTS:
    return Catch(flops=None)
  found, resampled = _fitted(late[:, 0] / last, late[:, 1], loss)
  if not found <= FARTHEST:
    return Catch(flops=None)
  low, high = (_quantile(resampled, share) for share in (0.025, 0.975))
  return Catch(flops=found * last, interval=(low * last, high * last))


def reached(curve: Curve, loss: float) -> float | None:
  """Where a curve is first at a loss, linear between its points."""
  before = None
  for flops, value in curve:
    if value <= loss:
      if before is None:
        return flops
      share = (before[1] - loss) / (before[1] - value)
      return before[0] + share * (flops - before[0])
    before = (flops, value)
  return None


def at(curve: Curve, flops: float) -> float | None:
  """The loss at some FLOPs, linear between points; None outside of them."""
  places, losses = zip(*curve, strict=True)
  if not places[0] <= flops <= places[-1]:
    return None
  return float(np.interp(flops, places, losses))


def _fitted(
  places: Float[np.ndarray, "P"], losses: Float[np.ndarray, "P"], loss: float
) -> tuple[float, Float[np.ndarray, "n"]]:
  """Where the fit reaches a loss, and where those of resamples do."""
  random = np.random.default_rng(0)
  (found,), (fit,) = _fit(places, losses[None], loss)
  drawn = random.choice(losses - fit, size=(_RESAMPLES, len(losses)))
  resampled, _ = _fit(places, fit + drawn, loss)
  return float(found), resampled


def _fit(
  places: Float[np.ndarray, "P"], losses: Float[np.ndarray, "n P"], loss: float
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n P"]]:
  """Least squares of n curves at once.

  Returns:
    Where each reaches `loss` (infinity where never), and its values; without a
    fit that is allowed, infinity and the curve's mean.
  """
  count = len(losses)
  best = np.full(count, np.inf)
  found = np.full(count, np.inf)
  values = np.repeat(losses.mean(1, keepdims=True), len(places), axis=1)
  for exponent in _EXPONENTS:
    design = np.stack([np.ones_like(places), places**-exponent], axis=1)
    (floor, scale), *_ = np.linalg.lstsq(design, losses.T, rcond=None)
    fit = (design @ np.stack([floor, scale])).T
    error = ((losses - fit) ** 2).sum(1)
    better = (error < best) & (floor >= 0) & (scale > 0)
    best = np.where(better, error, best)
    values = np.where(better[:, None], fit, values)
    found = np.where(better, _crossing(floor, scale, exponent, loss), found)
  return found, values


def _crossing(
  floor: Float[np.ndarray, "n"],
  scale: Float[np.ndarray, "n"],
  exponent: float,
  loss: float,
) -> Float[np.ndarray, "n"]:
  is_above = (loss > floor) & (scale > 0)
  ratio = np.where(is_above, loss - floor, 1.0) / np.where(is_above, scale, 1.0)
  return np.where(is_above, ratio ** (-1 / exponent), np.inf)


def _quantile(values: Float[np.ndarray, "n"], share: float) -> float:
  """The nearest of the values: between infinities there is no mean."""
  return float(np.sort(values)[round(share * (len(values) - 1))])
