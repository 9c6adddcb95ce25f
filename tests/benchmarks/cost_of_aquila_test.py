"""The page of costs is that of its results."""

from __future__ import annotations

import json

from benchmarks import cost_of_aquila


def test_the_page_is_of_the_results():
  found = json.loads(cost_of_aquila.RESULTS.read_text(encoding="utf-8"))
  written = cost_of_aquila.PAGE.read_text(encoding="utf-8")
  assert cost_of_aquila.page(found) == written
  assert "{" not in written
  for row in found["compiled"]:
    assert row["fits"]
    assert row["topology"] in written
