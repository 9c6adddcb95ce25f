"""The measured headline: what the control needed for EfficientScale's loss.

Both curves are validation losses on the same text against training FLOPs; those
of EfficientScale include all ancestors. Nothing is extrapolated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from aquila_jax.evaluation import formats
from aquila_jax.evaluation.results import Point, StageResult

Outcome = Literal["ahead", "even", "behind"]
# Ratios of FLOPs closer to 1 than this, where the control reached the loss, are
# called even: validations stand further apart than that.
_EVEN = 0.02

METHOD = (
  "Method: validation loss (cross-entropy, nats a token, all languages"
  " together) is measured on the same text at fixed intervals while training."
  " The control's FLOPs are those at which its validation curve first comes"
  " down to EfficientScale's last validation loss, linearly interpolated"
  " between two validations. FLOPs are those of the training steps, forward"
  " and backward, counted the same way for both; EfficientScale's include all"
  " ancestors. The control's learning rate comes down at the end of its own"
  " budget, so a control planned for fewer FLOPs might reach a given loss"
  " earlier than this one did. There is one run of each: how much two seeds"
  " differ was not measured."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline:
  """EfficientScale against one control. Losses in nats a token."""

  efficient: str  # name of the final stage
  control: str
  loss: float  # on which EfficientScale ended
  efficient_flops: float
  efficient_wall_s: float
  # Where the control's curve first came down to `loss`; None: it did not.
  control_flops: float | None
  control_wall_s: float | None
  at_first_validation: bool  # the curve begins there: it may have been earlier
  control_end_flops: float  # at its last validation
  control_end_loss: float
  # The control after EfficientScale's FLOPs, or after the last of its own where
  # that is within 2 %; None where it has no validation there.
  control_loss_at_same_flops: float | None

  @property
  def reached(self) -> bool:
    return self.control_flops is not None

  @property
  def flops_ratio(self) -> float:
    """The control's FLOPs over EfficientScale's.

    Where it did not reach the loss, of all it had: a lower bound.
    """
    flops = self.control_flops
    if flops is None:
      flops = self.control_end_flops
    return flops / self.efficient_flops

  @property
  def loss_difference(self) -> float | None:
    """The control minus EfficientScale at the same FLOPs; positive: ahead."""
    if self.control_loss_at_same_flops is None:
      return None
    return self.control_loss_at_same_flops - self.loss

  @property
  def outcome(self) -> Outcome | Literal["open"]:
    """For EfficientScale; "open" where the control stopped too early."""
    if self.reached:
      if abs(self.flops_ratio - 1) <= _EVEN:
        return "even"
      return "ahead" if self.flops_ratio > 1 else "behind"
    return "open" if self.loss_difference is None else "ahead"

  @property
  def title(self) -> str:
    """One sentence, whoever won."""
    ratio = formats.times(self.flops_ratio)
    if self.outcome == "open":
      return (
        "The control did not reach EfficientScale's loss, but had only"
        f" {ratio} times its FLOPs"
      )
    if not self.reached:
      bound = (
        f"{ratio} times the FLOPs"
        if self.flops_ratio > 1 + _EVEN
        else "the same FLOPs"
      )
      return f"The control did not reach EfficientScale's loss with {bound}"
    if self.outcome == "ahead":
      return (
        f"The control needed {ratio} times the FLOPs of EfficientScale for the"
        " same loss"
      )
    if self.outcome == "even":
      return (
        "The control reached EfficientScale's loss with about the same FLOPs:"
        " no saving was measured"
      )
    return (
      f"The control reached EfficientScale's loss with {ratio} times its FLOPs:"
      " EfficientScale lost this comparison"
    )

  @property
  def sentences(self) -> list[str]:
    """What was measured, in full."""
    end = (
      f"EfficientScale ({self.efficient}) ended at a validation loss of"
      f" {formats.loss(self.loss)} nats/token after"
      f" {formats.scientific(self.efficient_flops)} training FLOPs, all"
      f" ancestors included, in {formats.duration(self.efficient_wall_s)} of"
      " training."
    )
    return [end, self._way_there(), self._same_flops()]

  def _way_there(self) -> str:
    who = f"The control ({self.control})"
    if self.control_flops is None or self.control_wall_s is None:
      return (
        f"{who} did not reach it within"
        f" {formats.scientific(self.control_end_flops)} FLOPs; it ended at"
        f" {formats.loss(self.control_end_loss)}."
      )
    when = "by its first validation," if self.at_first_validation else "after"
    return (
      f"{who} first came down to it {when}"
      f" {formats.scientific(self.control_flops)} FLOPs,"
      f" {formats.times(self.flops_ratio)} times as many, in"
      f" {formats.duration(self.control_wall_s)} of training; it ended at"
      f" {formats.loss(self.control_end_loss)} after"
      f" {formats.scientific(self.control_end_flops)} FLOPs."
    )

  def _same_flops(self) -> str:
    other, difference = self.control_loss_at_same_flops, self.loss_difference
    if other is None or difference is None:
      return (
        "The control has no validation at EfficientScale's number of FLOPs, so"
        " there is no loss to compare at equal compute."
      )
    words = "the same to three decimals"
    if abs(difference) >= 0.0005:
      side = "higher" if difference > 0 else "lower"
      words = f"{formats.loss(abs(difference))} nats/token {side}"
    return (
      "At EfficientScale's number of FLOPs the control's loss was"
      f" {formats.loss(other)}, {words}."
    )


def headline(efficient: StageResult, control: StageResult) -> Headline | None:
  """Compares a final stage with its control.

  Args:
    efficient: the stage on which EfficientScale ended.
    control: trained from scratch.

  Returns:
    The comparison, or None where one of the two has no validation.
  """
  own, other = efficient.validation_curve(), control.validation_curve()
  if not own or not other or not own[-1].flops:
    return None
  last = own[-1]
  crossing = _first_crossing(other, last.value)
  return Headline(
    efficient=efficient.name,
    control=control.name,
    loss=last.value,
    efficient_flops=last.flops,
    efficient_wall_s=last.wall_s,
    control_flops=None if crossing is None else crossing.flops,
    control_wall_s=None if crossing is None else crossing.wall_s,
    at_first_validation=crossing == other[0],
    control_end_flops=other[-1].flops,
    control_end_loss=other[-1].value,
    control_loss_at_same_flops=_loss_at(other, last.flops),
  )


def _first_crossing(curve: Sequence[Point], loss: float) -> Point | None:
  """Where the curve first is at or below `loss`.

  A curve that begins there crosses at its first point: where it was before is
  not known.
  """
  for i, point in enumerate(curve):
    if point.value > loss:
      continue
    if i == 0:
      return point
    before = curve[i - 1]
    share = (before.value - loss) / (before.value - point.value)
    return _between(before, point, share)
  return None


def _loss_at(curve: Sequence[Point], flops: float) -> float | None:
  """The loss at so many FLOPs; None outside of the curve, but for 2 %."""
  if flops < curve[0].flops:
    return None
  if flops >= curve[-1].flops:
    near = flops <= curve[-1].flops * (1 + _EVEN)
    return curve[-1].value if near else None
  i = next(i for i, point in enumerate(curve) if point.flops > flops)
  before, after = curve[i - 1], curve[i]
  share = (flops - before.flops) / (after.flops - before.flops)
  return _between(before, after, share).value


def _between(before: Point, after: Point, share: float) -> Point:
  pairs = zip(before, after, strict=True)
  return Point(*(a + share * (b - a) for a, b in pairs))
