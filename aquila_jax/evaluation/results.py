"""What a report is made of, and the curves that follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aquila_jax.evaluation.formats import Number
from aquila_jax.evaluation.scores import Scores

Row = Mapping[str, Any]


class Point(NamedTuple):
  """A value and where it stands: FLOPs and seconds since the first ancestor."""

  flops: float
  wall_s: float
  value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A prompt and what a model made of it."""

  prompt: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
  """One stage of an experiment, with all that was measured of it."""

  name: str
  kind: str  # of the transform: scratch, load, scale_up or scale_out
  parameters: int
  active_parameters: int  # that one token meets
  flops_per_token: Number  # of training, forward and backward
  method: str = ""  # of the transform
  parent: str = ""  # the stage it came from
  is_control: bool = False
  # metrics.jsonl and validation.jsonl. Steps, tokens, flops and wall_s in them
  # are of this stage alone.
  rows: Sequence[Row] = ()
  validation: Sequence[Row] = ()
  # What all ancestors took.
  flops_before: Number = 0.0
  wall_before_s: Number = 0.0
  # The wall time by what it was spent on, "steps" among it; {} is not known.
  spent_s: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  # Validation loss of the source, under "source", and right after the transform
  # by each method tried, `method` among them.
  transform_losses: Mapping[str, Number] = dataclasses.field(
    default_factory=dict
  )
  evaluation: Scores | None = None
  samples: Sequence[Sample] = ()
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def steps(self) -> int:
    return int(self._last("step"))

  @property
  def tokens(self) -> int:
    return int(self._last("tokens"))

  @property
  def flops(self) -> float:
    return self._last("flops")

  @property
  def wall_s(self) -> float:
    return self._last("wall_s")

  @property
  def tokens_per_s(self) -> float:
    return self.tokens / self.wall_s if self.wall_s else 0.0

  @property
  def goodput(self) -> float | None:
    """The share of wall time in steps, where it is known."""
    total = sum(self.spent_s.values())
    return float(self.spent_s["steps"] / total) if total else None

  @property
  def has_experts(self) -> bool:
    return any("expert_load" in row for row in self.rows)

  @property
  def transform(self) -> str:
    """How the weights came about, in words."""
    method = METHOD_NAMES.get(self.method, self.method)
    return f"{_words(self.kind)}, {method}".rstrip(", ")

  @property
  def title(self) -> str:
    """Name and transform, without saying a word twice."""
    if _words(self.name) == _words(self.kind):
      return self.transform
    return f"{self.name}: {self.transform}"

  def curve(self, key: str) -> list[Point]:
    """The finite values of a field of the metrics, over the lineage."""
    return [
      Point(
        self.flops_before + row["flops"],
        self.wall_before_s + row["wall_s"],
        float(row[key]),
      )
      for row in self.rows
      if is_finite(row.get(key))
    ]

  def validation_curve(self, key: str = "loss") -> list[Point]:
    """The finite values of a field of the validations, over the lineage.

    A validation row has a step; FLOPs and seconds, where it does not say them,
    are those of the training rows around it.
    """
    steps = [0.0, *(row["step"] for row in self.rows)]
    along = {
      name: [0.0, *(row[name] for row in self.rows)]
      for name in ("flops", "wall_s")
    }

    def at(row: Row, name: str) -> float:
      if is_finite(row.get(name)):
        return float(row[name])
      return float(np.interp(row["step"], steps, along[name]))

    return [
      Point(
        self.flops_before + at(row, "flops"),
        self.wall_before_s + at(row, "wall_s"),
        float(row[key]),
      )
      for row in self.validation
      if is_finite(row.get(key))
    ]

  def _last(self, name: str) -> float:
    return float(self.rows[-1][name]) if self.rows else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportInput:
  """An experiment: its stages in order, and what they stand on."""

  name: str
  stages: Sequence[StageResult]
  split: str = "test"  # of the evaluations
  created: str = ""  # date and time, as they are to be shown
  # Everything of the resolved config that is not in a stage's.
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
  machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  dataset_card: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def final(self) -> StageResult | None:
    """The last stage that is no control: what EfficientScale ended on."""
    own = [stage for stage in self.stages if not stage.is_control]
    return own[-1] if own else None

  @property
  def lineage(self) -> list[StageResult]:
    """The stages that led to the final one, it included, oldest first."""
    by_name = {stage.name: stage for stage in self.stages}
    chain: list[StageResult] = []
    stage = self.final
    while stage is not None and stage not in chain:
      chain.append(stage)
      stage = by_name.get(stage.parent)
    return chain[::-1]

  @property
  def controls(self) -> list[StageResult]:
    return [stage for stage in self.stages if stage.is_control]

  @property
  def languages(self) -> list[str]:
    """Of the metrics and the evaluations, in order of appearance."""
    names: dict[str, None] = {}
    for stage in self.stages:
      for row in stage.rows[:1]:
        found = [key for key in row if key.startswith("loss_")]
        names |= dict.fromkeys(key.removeprefix("loss_") for key in found)
      if stage.evaluation is not None:
        names |= dict.fromkeys(stage.evaluation.languages)
    return list(names)


def _words(name: str) -> str:
  return name.replace("_", " ").replace("-", " ")


# As people write them.
METHOD_NAMES = {
  "fpi": "FPI",
  "aki": "AKI",
  "aki_pro": "AKI-Pro",
  "bert2bert": "bert2BERT",
  "hypercloning": "HyperCloning",
  "lemon": "LEMON",
  "msg": "MSG",
  "ligo": "LiGO",
  "random": "random",
  "sparse_upcycling": "sparse upcycling",
  "granular": "granular upcycling",
  "drop_upcycling": "Drop-Upcycling",
  "noise": "upcycling with noise",
  "branch_train_mix": "Branch-Train-MiX",
  "average": "average of experts",
  "merge_by_usage": "experts merged by usage",
}


def is_finite(value: Any) -> bool:
  """Whether a field of a row is there and is a finite number."""
  return isinstance(value, int | float) and math.isfinite(value)


def smooth(points: Sequence[Point]) -> tuple[list[Point], int]:
  """A centred moving average over a 25th of the points.

  Args:
    points: of one stage, in order.

  Returns:
    The averages, at the same places, and how many points each is over (fewer
    at the ends).
  """
  window = max(1, round(len(points) / 25)) | 1  # odd, so that it is centred
  reach = window // 2
  averages = []
  for i, point in enumerate(points):
    # Narrower towards the ends, so that the average stays centred.
    near = min(reach, i, len(points) - 1 - i)
    values = [p.value for p in points[i - near : i + near + 1]]
    averages.append(point._replace(value=float(np.mean(values))))
  return averages, window


def thin(points: Sequence[Point], *, limit: int = 400) -> list[Point]:
  """At most about `limit` points: means over neighbours."""
  stride = -(-len(points) // limit) or 1
  if stride == 1:
    return list(points)
  groups = [points[i : i + stride] for i in range(0, len(points), stride)]
  return [
    Point(*(float(np.mean(column)) for column in zip(*group, strict=True)))
    for group in groups
  ]
