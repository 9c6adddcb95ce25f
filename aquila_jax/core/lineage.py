"""What a model went through: transforms and training, from its root."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """One transform or one stretch of training."""

  kind: str  # "scratch", "import", "scale_up", "scale_out" or "train"
  name: str = ""  # of the stage
  parent: str = ""  # the MODEL it came from, as it was given
  # Of a transform, all its options (of a learned one, what it learned too); of
  # training, the TrainConfig.
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  steps: int = 0
  tokens: int = 0
  flops: float = 0.0
  # Of a growth: for each axis name the half-open ranges that it added.
  new_indices: dict[str, list[list[int]]] = dataclasses.field(
    default_factory=dict
  )
  # Of training, and of a growth that was learned: the position in the data
  # where it ended.
  data_state: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
  """The events of a model's life, oldest first."""

  events: tuple[Event, ...] = ()

  def then(self, event: Event) -> Lineage:
    """The lineage with one more event."""
    return Lineage(events=(*self.events, event))

  @property
  def steps(self) -> int:
    return sum(event.steps for event in self.events)

  @property
  def tokens(self) -> int:
    return sum(event.tokens for event in self.events)

  @property
  def flops(self) -> float:
    """Training FLOPs, ancestors included."""
    return sum(event.flops for event in self.events)

  @property
  def data_state(self) -> dict[str, Any] | None:
    """Where training last left the data, or None before any training."""
    states = [e.data_state for e in self.events if e.data_state is not None]
    return states[-1] if states else None

  @property
  def new_indices(self) -> dict[str, list[list[int]]] | None:
    """What the last Scale-Up added, or None where there was none."""
    grown = [e.new_indices for e in self.events if e.kind == "scale_up"]
    return grown[-1] if grown else None

  def to_json(self) -> list[dict[str, Any]]:
    return [dataclasses.asdict(event) for event in self.events]

  @classmethod
  def from_json(cls, events: list[dict[str, Any]]) -> Lineage:
    return cls(events=tuple(Event(**event) for event in events))
