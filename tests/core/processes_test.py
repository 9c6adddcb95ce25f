"""What is left of several processes where there is one.

tests/cli/processes_test.py has several.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import processes


def test_a_process_on_its_own_is_the_first_and_waits_for_nobody():
  assert (processes.index(), processes.count()) == (0, 1)
  assert processes.is_first() and not processes.are_several()
  made = object()  # not even through JSON
  assert processes.from_first(lambda: made, name="x") is made
  done = []
  processes.by_first(lambda: done.append(1), name="x")
  processes.barrier("x")
  assert done == [1]


def test_what_the_first_raises_is_raised():
  with pytest.raises(ZeroDivisionError):
    processes.from_first(lambda: 1 / 0, name="x")


@pytest.mark.parametrize("several", [False, True])
def test_arrays_are_placed_and_fetched_whole(monkeypatch, several):
  """All devices are this process's, whichever way it takes."""
  monkeypatch.setattr(processes, "are_several", lambda: several)
  monkeypatch.setattr(processes, "is_spread", lambda array: several)
  mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
  sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
  tree = {"x": np.arange(32.0, dtype=np.float32).reshape(8, 4), "none": None}
  placed = processes.place(tree, {"x": sharding, "none": None})
  assert placed["none"] is None
  assert placed["x"].sharding == sharding
  assert placed["x"].addressable_shards[0].data.shape == (2, 2)
  np.testing.assert_array_equal(processes.fetch(placed["x"]), tree["x"])
  for index in [(3,), (7, 1)]:
    found = processes.fetch(placed["x"], index=index)
    np.testing.assert_array_equal(found, tree["x"][index])
    assert isinstance(found, np.ndarray)
