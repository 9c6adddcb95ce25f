"""What a model went through: transforms and training, from its root."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

# Of an axis name: for every index, how many indices hold copies of the same
# source index, itself included.
Copies = Mapping[str, Int[np.ndarray, " size"]]


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
  # Of a Scale-Up: what it kept, and where each axis comes from.
  growth: dict[str, Any] | None = None
  # Of a growth that copies: for each axis of width the map, as `copy_runs`.
  copies: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
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

  @property
  def copies(self) -> Copies | None:
    """The copies that training in function space divides by.

    Those of the last Scale-Up. Where all training since an earlier one was in
    function space too, its growth is carried on: with g the later map, index i
    then stands for c_earlier[g(i)] c_later[i] indices of the smaller model.

    Returns:
      Counts by axis name; an axis without any has no copies. None where the
      last Scale-Up copied nothing, where its event was written before events
      had copies, or where there was none.
    """
    counts: dict[str, np.ndarray] = {}
    carried = False
    for event in self.events:
      if event.kind == "train" and not _in_function_space(event):
        # What is grown from here on was trained at rates of its own.
        carried = False
      if event.kind == "scale_up":
        earlier = counts if carried and event.copies else {}
        counts = earlier | {
          name: _composed(runs, earlier.get(name))
          for name, runs in event.copies.items()
        }
        carried = True
    return counts or None

  @property
  def trained_steps(self) -> int | None:
    """Steps since the weights were drawn or imported.

    None where they are as they were drawn. An import is trained, and the steps
    that it had elsewhere are not counted.
    """
    steps = None
    for event in self.events:
      if event.kind == "scratch" or _drew_weights(event):
        steps = None
      elif event.kind == "import":
        steps = 0
      elif event.kind == "train":
        steps = (steps or 0) + event.steps
    return steps

  def to_json(self) -> list[dict[str, Any]]:
    return [dataclasses.asdict(event) for event in self.events]

  @classmethod
  def from_json(cls, events: list[dict[str, Any]]) -> Lineage:
    return cls(events=tuple(Event(**event) for event in events))


def copy_runs(
  source: Int[np.ndarray, " target"], counts: Int[np.ndarray, " target"]
) -> list[list[int]]:
  """An index map and its counts in runs, small enough for JSON.

  Args:
    source: the source index that every target index copies; -1 copies none.
    counts: how many target indices copy that source index; 1 where none.

  Returns:
    [first, length, count] a run, in the order of the target indices: `length`
    of them copy the source indices from `first` on, each of which is copied
    `count` times. A circular map has a few runs, a random one a run a draw:

    >>> source = np.arange(5120) % 4096
    >>> copy_runs(source, np.bincount(source)[source])
    [[0, 1024, 2], [1024, 3072, 1], [0, 1024, 2]]
  """
  none = source < 0
  follows = np.where(none[1:], none[:-1], np.diff(source) == 1)
  breaks = ~follows | (np.diff(none) != 0) | (np.diff(counts) != 0)
  starts = np.flatnonzero(np.concatenate([[True], breaks]))
  lengths = np.diff(np.append(starts, len(source)))
  return np.stack([source[starts], lengths, counts[starts]], axis=1).tolist()


def expand_runs(
  runs: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, " target"], Int[np.ndarray, " target"]]:
  """The index map and counts of `copy_runs`."""
  first, lengths, counts = np.asarray(runs).T
  starts = np.cumsum(lengths) - lengths
  source = np.arange(lengths.sum()) + np.repeat(first - starts, lengths)
  source = np.where(np.repeat(first, lengths) < 0, -1, source)
  return source, np.repeat(counts, lengths)


def _composed(
  runs: Sequence[Sequence[int]], earlier: Int[np.ndarray, " source"] | None
) -> Int[np.ndarray, " target"]:
  """The counts of a map whose source has counts itself."""
  source, counts = expand_runs(runs)
  if earlier is None:
    return counts
  return np.where(source < 0, 1, counts * earlier[np.maximum(source, 0)])


def _in_function_space(event: Event) -> bool:
  # Training that was written down before there was a choice was plain.
  optimizer = event.options.get("optimizer", {})
  return optimizer.get("growth_lr", "plain") == "function_space"


def _drew_weights(event: Event) -> bool:
  return event.kind == "scale_up" and event.options.get("method") == "random"
