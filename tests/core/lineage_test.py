"""A lineage adds up over its events and survives JSON."""

from __future__ import annotations

import json

from aquila_jax.core.lineage import Event, Lineage

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
