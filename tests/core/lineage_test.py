"""A lineage adds up over its events and survives JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from aquila_jax.core.lineage import Event, Lineage, copy_runs, expand_runs

LINEAGE = (
  Lineage()
  .then(Event(kind="scratch", name="dense", options={"seed": 0}))
  .then(
    Event(kind="train", steps=10, tokens=100, flops=1e3, data_state={"rows": 7})
  )
  .then(
    Event(
      kind="scale_up",
      parent="runs/a/model",
      new_indices={"embed": [[4, 8]], "layer": [[1, 2]]},
      copies={"embed": [[0, 4, 2], [0, 4, 2]]},
    )
  )
  .then(
    Event(kind="train", steps=5, tokens=60, flops=2e3, data_state={"rows": 9})
  )
  .then(Event(kind="scale_out"))
)


def test_sums_run_over_all_ancestors():
  assert LINEAGE.steps == 15
  assert LINEAGE.tokens == 160
  assert LINEAGE.flops == 3e3


def test_data_goes_on_where_the_last_training_left_it():
  assert LINEAGE.data_state == {"rows": 9}
  assert Lineage().data_state is None


def test_new_indices_are_those_of_the_last_growth():
  assert LINEAGE.new_indices == {"embed": [[4, 8]], "layer": [[1, 2]]}
  later = LINEAGE.then(Event(kind="scale_up", new_indices={"mlp": [[2, 3]]}))
  assert later.new_indices == {"mlp": [[2, 3]]}
  assert Lineage().new_indices is None


def test_json_round_trip():
  written = json.dumps(LINEAGE.to_json())
  assert Lineage.from_json(json.loads(written)) == LINEAGE


def test_an_event_written_before_there_were_copies_is_read():
  old = {"kind": "scale_up", "new_indices": {"embed": [[4, 8]]}}
  lineage = Lineage.from_json([old])
  assert lineage.events[0].copies == {}
  assert lineage.copies is None


def test_a_circular_map_is_a_few_runs():
  source = np.arange(5120) % 4096
  counts = np.where(source < 1024, 2, 1)
  runs = copy_runs(source, counts)
  assert runs == [[0, 1024, 2], [1024, 3072, 1], [0, 1024, 2]]


@pytest.mark.parametrize(
  "source",
  [
    [0],
    [0, 1, 2, 0, 1],
    [0, 1, 2, 2, 0, 2],
    [2, 1, 0, 0],
    [0, 1, -1, -1],
    [-1, 0, -1, -1, 0],
  ],
)
def test_runs_are_expanded_again(source):
  given = np.array(source)
  counts = np.bincount(given[given >= 0])[given]
  counts = np.where(given < 0, 1, counts)
  back = expand_runs(copy_runs(given, counts))
  np.testing.assert_array_equal(back, (given, counts))


def test_what_copies_nothing_is_one_run():
  runs = copy_runs(np.array([0, 1, -1, -1, -1]), np.ones(5, int))
  assert runs == [[0, 2, 1], [-1, 3, 1]]


# 2 -> 3 is 0 1 0, and 3 -> 5 is 0 1 2 0 1.
_FIRST = Event(
  kind="scale_up", copies={"mlp": [[0, 1, 2], [1, 1, 1], [0, 1, 2]]}
)
_SECOND = Event(
  kind="scale_up", copies={"mlp": [[0, 2, 2], [2, 1, 1], [0, 2, 2]]}
)
_RANDOM = Event(kind="scale_up", options={"method": "random"})
_PLAIN = Event(kind="train", steps=3)
_CHOSEN = Event(
  kind="train", steps=3, options={"optimizer": {"growth_lr": "plain"}}
)
_IN_FUNCTION_SPACE = Event(
  kind="train", steps=3, options={"optimizer": {"growth_lr": "function_space"}}
)
_SCALE_OUT = Event(kind="scale_out")
_ALONE = [2, 2, 1, 2, 2]
# The five stand for the indices 0 1 0 0 1 of two, of which the first was
# copied to 0 and 2 of three, and those to 0, 3 and to 2.
_TOGETHER = [4, 2, 2, 4, 2]


@pytest.mark.parametrize(
  "events, expected",
  [
    ([], None),
    ([_PLAIN], None),
    ([_RANDOM], None),
    ([_FIRST], [2, 1, 2]),
    ([_FIRST, _PLAIN], [2, 1, 2]),
    ([_PLAIN, _FIRST, _IN_FUNCTION_SPACE, _SCALE_OUT], [2, 1, 2]),
    ([_FIRST, _RANDOM], None),
    ([_RANDOM, _SECOND], _ALONE),
    ([_FIRST, _PLAIN, _SECOND], _ALONE),
    ([_FIRST, _CHOSEN, _IN_FUNCTION_SPACE, _SECOND], _ALONE),
    ([_FIRST, _SECOND], _TOGETHER),
    ([_FIRST, _IN_FUNCTION_SPACE, _SCALE_OUT, _SECOND, _PLAIN], _TOGETHER),
  ],
)
def test_copies_are_carried_through_training_in_function_space(
  events, expected
):
  copies = Lineage(events=tuple(events)).copies
  if expected is None:
    assert copies is None
  else:
    assert copies is not None
    np.testing.assert_array_equal(copies["mlp"], expected)


@pytest.mark.parametrize(
  "events, expected",
  [
    ([], None),
    ([Event(kind="scratch")], None),
    ([Event(kind="scratch"), _FIRST, _SCALE_OUT], None),
    ([Event(kind="scratch"), _PLAIN, _FIRST, _PLAIN, _SCALE_OUT], 6),
    ([Event(kind="import")], 0),
    ([Event(kind="scratch"), _PLAIN, Event(kind="import"), _PLAIN], 3),
    ([_PLAIN, _RANDOM], None),
    ([_PLAIN, _RANDOM, _PLAIN], 3),
  ],
)
def test_steps_are_counted_since_the_weights_were_drawn(events, expected):
  assert Lineage(events=tuple(events)).trained_steps == expected
