"""The page of costs is that of its results, and these add up by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks import cost_of_aquila

# AquilaMoE-8x16B, by letters of core/axes.py, and its heads' width of keys.
L, D, F, E, A, V, T = 40, 5120, 20480, 8, 2, 151_851, 4096
KEYS = 8 * 128
# Of one layer.
PROJECTIONS = 2 * D * D + 2 * D * KEYS
BIASES = D + 2 * KEYS
EXPERT = 3 * D * F
# Of bfloat16, a second and chip, in the makers' tables.
PEAK = {"v5p": 459e12, "v6e": 918e12}
DAY = 86_400


def test_the_page_is_of_the_results():
  found = json.loads(cost_of_aquila.RESULTS.read_text(encoding="utf-8"))
  written = cost_of_aquila.PAGE.read_text(encoding="utf-8")
  assert cost_of_aquila.page(found) == written
  assert "{" not in written
  for row in found["compiled"]:
    assert row["fits"]
    assert row["topology"] in written


def _flops_per_token() -> float:
  """Two a weight that a token meets, and scores; three times with gradients."""
  weights = L * (PROJECTIONS + D * E + A * EXPERT) + V * D
  return 3 * (2 * weights + L * 4 * T * D)


@pytest.mark.parametrize("row", range(4))
def test_a_plan_adds_up_by_hand(row):
  found = json.loads(cost_of_aquila.RESULTS.read_text(encoding="utf-8"))
  plan = found["compiled"][row]
  mesh, seconds, memory = plan["mesh"], plan["seconds"], plan["memory"]
  # Experts and their routers are in parts over both axes, biases nowhere.
  divided = L * (PROJECTIONS + 2 * D) + 2 * V * D + D
  experts = L * E * (EXPERT + D) / mesh["expert"]
  floats = (divided + experts) / mesh["fsdp"] + L * BIASES
  assert memory["parameters"] == 4 * floats
  # Two moments, and the number of the step.
  assert memory["optimizer"] == 2 * memory["parameters"] + 4
  kinds = ("parameters", "optimizer", "batch", "temporaries")
  assert memory["total"] == sum(memory[kind] for kind in kinds)
  assert memory["total"] < memory["hbm"]

  chips, tokens = plan["num_devices"], plan["tokens_per_step"]
  flops = _flops_per_token() * tokens / chips
  assert plan["flops_per_device"] == pytest.approx(flops, rel=1e-12)
  at_peak = flops / PEAK[plan["topology"][:3]]
  assert seconds["flops_at_published_rate"] == pytest.approx(at_peak, rel=1e-12)
  alone = [seconds[kind] for kind in ("compiler", "kernels", "memory", "links")]
  assert seconds["without_overlap"] == pytest.approx(sum(alone), rel=1e-12)
  step = seconds["as_scheduled"]
  assert seconds["with_full_overlap"] <= step <= seconds["without_overlap"]
  assert plan["mfu"] == pytest.approx(at_peak / step, rel=1e-12)
  assert plan["tokens_per_day"] == pytest.approx(tokens * DAY / step, rel=1e-12)
  days = plan["token_budget"] / plan["tokens_per_day"]
  assert plan["days"] == pytest.approx(days, rel=1e-12)
  assert plan["device_days"] == pytest.approx(days * chips, rel=1e-12)


@pytest.mark.parametrize("row", range(4))
def test_every_expert_is_gathered_twice_a_microbatch(row):
  """Forward, and again for the backward pass; with it what else is divided."""
  found = json.loads(cost_of_aquila.RESULTS.read_text(encoding="utf-8"))
  plan = found["compiled"][row]
  (gathered,) = (
    each["bytes"]
    for each in plan["collectives"]
    if (each["kind"], each["axes"]) == ("all-gather", ["fsdp"])
  )
  passes, width = 2 * plan["num_microbatches"], 2  # bytes of bfloat16
  experts = passes * width * L * E * EXPERT / plan["mesh"]["expert"]
  others = passes * width * (L * PROJECTIONS + 2 * V * D)
  assert experts <= gathered <= 1.005 * (experts + others)
