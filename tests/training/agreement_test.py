from __future__ import annotations

import itertools

import numpy as np

from aquila_jax.training.agreement import RoutingWatch, agreement


def test_agreement_is_of_sets_and_of_what_is_chosen():
  rng = np.random.default_rng(0)
  before, after = (
    np.stack(
      [
        [[rng.permutation(5)[:3] for _ in range(6)] for _ in range(2)]
        for _ in range(4)
      ]
    )
    for _ in range(2)
  )
  # Padding, and a token that nobody took the second time.
  before[:, 1, 4:] = after[:, 1, 4:] = -1
  after[:, 0, 0, 1:] = -1
  found = agreement(before, after)
  for layer in range(4):
    kept = total = 0
    for row, token in itertools.product(range(2), range(6)):
      old, new = (set(ids[layer, row, token]) - {-1} for ids in (before, after))
      kept, total = kept + len(old & new), total + len(new)
    assert found[layer] == kept / total


def test_a_checkpoint_is_compared_with_the_last():
  ids = {
    "start": np.array([[[[0, 1]]], [[[2, 3]]]]),
    "first": np.array([[[[1, 2]]], [[[2, 3]]]]),
    "second": np.array([[[[2, 1]]], [[[0, 1]]]]),
  }
  watch = RoutingWatch.start(ids.__getitem__, "start", layers=(1, 3), step=0)
  assert watch.row(10, "first") == {
    "step": 10,
    "since_step": 0,
    "agreement": [None, 0.5, None, 1.0],
  }
  assert watch.row(25, "second") == {
    "step": 25,
    "since_step": 10,
    "agreement": [None, 1.0, None, 0.0],
  }
