"""The arithmetic of a plan, by hand, and what its table says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from aquila_jax.planning import step_plan
from aquila_jax.planning.step_plan import Collectives, Memory, StepPlan
from aquila_jax.planning.tpu_program import Estimate, Part

MESH = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


def _collective(kind: str, group: tuple[int, ...], seconds: float) -> Part:
  return Part(
    name=kind,
    opcode=kind,
    trips=3,
    seconds=seconds,
    source="link",
    bytes=100,
    group=group,
  )


def _plan(**fields) -> StepPlan:
  compute = Part(
    name="a", opcode="fusion", trips=1, seconds=3.0, source="estimate"
  )
  parts = (compute, _collective("all-gather", (0, 2), 1.0))
  plan = StepPlan(
    stage="dense",
    topology="v5p:2x2x2",
    device_kind="TPU v5",
    mesh=MESH,
    tokens=1_000_000,
    num_microbatches=2,
    remat="full",
    flops=4.59e14,  # a second at the published rate
    memory=Memory(
      parameters=10, optimizer=20, batch=3, temporaries=40, hbm=100.0
    ),
    estimate=Estimate(parts=parts, unknown_kernels=(), unknown_loops=()),
    collectives=step_plan.by_axes(parts, mesh=MESH),
  )
  return dataclasses.replace(plan, **fields)


def test_times_rates_and_days():
  plan = _plan()
  assert plan.num_devices == 8
  assert plan.seconds == 4.0
  assert plan.mfu == pytest.approx(0.25)
  assert plan.tokens_per_day == 86400 * 250_000
  assert plan.days(86400 * 250_000 * 7) == pytest.approx(7)
  assert plan.memory.total == 73
  assert plan.memory.fits


def test_collectives_are_by_kind_and_axes():
  parts = (
    _collective("all-gather", (0, 2), 1.0),
    _collective("all-gather", (4, 6), 2.0),  # fsdp as well
    _collective("all-gather", (0, 1, 2, 3), 5.0),
    _collective("all-reduce", (0, 4), 0.5),
    _collective("all-reduce", tuple(range(8)), 0.25),
  )
  assert step_plan.by_axes(parts, mesh=MESH) == (
    Collectives(
      kind="all-gather",
      axes=("fsdp", "expert"),
      count=3,
      bytes=300,
      seconds=5.0,
    ),
    Collectives(
      kind="all-gather", axes=("fsdp",), count=6, bytes=600, seconds=3.0
    ),
    Collectives(
      kind="all-reduce", axes=("data",), count=3, bytes=300, seconds=0.5
    ),
    Collectives(
      kind="all-reduce",
      axes=("data", "fsdp", "expert"),
      count=3,
      bytes=300,
      seconds=0.25,
    ),
  )


def test_json_has_what_the_table_has():
  plan = _plan()
  said = json.loads(step_plan.dumps(plan, token_budget=2_160_000_000_000))
  assert said["fits"]
  assert said["memory"]["total"] == 73
  assert (said["num_microbatches"], said["remat"]) == (2, "full")
  assert said["seconds"]["without_overlap"] == 4
  assert said["seconds"]["as_scheduled"] == 4
  assert said["seconds"]["with_full_overlap"] == 3
  assert said["seconds"]["flops_at_published_rate"] == pytest.approx(1)
  assert said["days"] == pytest.approx(100)
  assert said["device_days"] == pytest.approx(800)
  assert said["collectives"][0]["axes"] == ["fsdp"]
  text = step_plan.table(plan, token_budget=2_160_000_000_000)
  for line in (
    "8 of TPU v5, mesh data 2, fsdp 2, expert 2, tensor 1",
    "fits yes",
    "nothing beside anything 4.000",
    "as it is scheduled 4.000",
    "MFU, without overlap 25.0%",
    "MFU, as it is scheduled 25.0%",
    "days for 2,160 billion 100.0",
    "all-gather fsdp 3 0.00 1.000",
  ):
    assert line in " ".join(text.split())


def test_what_does_not_fit_says_so_and_claims_nothing():
  memory = Memory(
    parameters=10, optimizer=20, batch=3, temporaries=None, hbm=100.0
  )
  plan = _plan(
    memory=memory, estimate=None, collectives=(), message="Ran out of memory"
  )
  text = step_plan.table(plan, token_budget=1)
  assert "NO  Ran out of memory" in text
  assert "MFU" not in text
  said = json.loads(step_plan.dumps(plan, token_budget=1))
  assert not said["fits"]
  assert said["seconds"] is None
  assert said["days"] is None
  too_much = dataclasses.replace(memory, temporaries=68)
  assert not too_much.fits
