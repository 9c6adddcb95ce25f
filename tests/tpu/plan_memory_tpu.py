"""`plan memory` beside what the TPU's compiler assigns."""

from __future__ import annotations

import sys

import pytest

from benchmarks import plan_memory

# A dense one, experts over an axis of their own in microbatches, and a mixture
# that keeps everything.
NAMES = (
  "small dense",
  "small mixture, no remat",
  "small mixture, 4 of experts, 4 parts",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_estimate_is_within_a_tenth(name):
  (case,) = [one for one in plan_memory.cases() if one.name == name]
  compiler = plan_memory.compiled_bytes(case, sys.executable)
  assert compiler is not None
  assert plan_memory.estimated(case)["estimate"] == pytest.approx(
    compiler, rel=0.1
  )
