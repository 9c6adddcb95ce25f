"""What is compared, and what a row says of a program."""

from __future__ import annotations

import pytest

from aquila_jax.planning import counting
from benchmarks import pod_step
from tests.planning.tpu_program_test import TEXT, TORUS


def test_cases_are_of_64_chips_and_of_the_published_sizes():
  cases = {case.name: case for case in pod_step.cases()}
  assert len(cases) == 4
  for case in cases.values():
    mesh = case.mesh
    assert mesh.data * mesh.fsdp * mesh.expert * mesh.tensor == 64
    assert case.model.remat == "full"
  counted = {
    name: round(counting.count(case.model).total.parameters / 1e9, 1)
    for name, case in cases.items()
  }
  assert counted["mixtral 8x7b dropless, fsdp 64"] == 46.7
  assert counted["aquila 8x16b dropless, fsdp 64"] == 104.7


def test_a_row_has_memory_time_and_what_is_not_known():
  case = pod_step.cases()[0]
  row = pod_step.row_of(
    case,
    "ours",
    text=TEXT,
    kernel_cycles={"kernel.1": 1_750_000_000},
    memory=dict(arguments=2e9, temporaries=3e9),
    coordinates=TORUS,
    device_kind="TPU v5",
  )
  assert (row["arguments_gb"], row["temporaries_gb"]) == (2, 3)
  # Six runs of the kernel and one of its twin, a second each.
  assert row["kernels_s"] == pytest.approx(7)
  assert row["seconds_without_overlap"] == pytest.approx(7, rel=1e-6)
  assert row["loops_counted_once"] == ("while.2",)
  flops = (
    4 * 4096 * counting.train_flops_per_token(case.model, sequence_length=4096)
  )
  assert row["mfu"] == pytest.approx(flops / 4.59e14 / 7, rel=1e-6)


def test_steps_of_a_grouped_product_are_those_of_its_tiles_and_borders():
  case = pod_step.cases()[0]
  assert pod_step.steps(case.model) == 64 + 7
