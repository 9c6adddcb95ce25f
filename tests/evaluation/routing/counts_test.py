from __future__ import annotations

import collections

import numpy as np
import pytest

from aquila_jax.evaluation.routing import counts as counts_lib
from aquila_jax.evaluation.routing.counts import TokenExperts


@pytest.mark.parametrize("pending", [0, 10, 2**20])
def test_merging_changes_no_count(monkeypatch, pending):
  monkeypatch.setattr(counts_lib, "_PENDING", pending)
  generator = np.random.default_rng(0)
  table, expected = TokenExperts(5), collections.Counter()
  for _ in range(7):
    tokens = generator.integers(0, 6, 9)
    ids = generator.integers(-1, 5, (9, 2))
    table.add(tokens, ids)
    for token, experts in zip(tokens, ids, strict=True):
      for expert in experts[experts >= 0]:
        expected[int(token), int(expert)] += 1
  tokens, experts, counts = table.entries()
  pairs = list(zip(tokens.tolist(), experts.tolist(), strict=True))
  assert pairs == sorted(expected)
  assert counts.tolist() == [expected[pair] for pair in pairs]
