"""What a growth and an export take, by hand; without a compiler."""

from __future__ import annotations

import dataclasses

import pytest

from aquila_jax.interop.export_model import measure
from aquila_jax.pipeline.planned_growth import plan_export
from aquila_jax.planning.transform_plan import (
  GROWN_PER_SECOND,
  GrowthPlan,
  export_table,
  growth_table,
)
from tests.planning.step_memory_test import MODEL

PLAN = GrowthPlan(
  stage="scale_out",
  topology="v5e:2x2",
  mesh=dict(data=1, fsdp=4),
  source_bytes=2**30,
  target_bytes=int(GROWN_PER_SECOND * 7),
  held=2**31,
  filling=3 * 2**30,
  placing=2**32,
  hbm=15.75 * 2**30,
)


def test_a_growth_is_as_large_as_at_its_largest():
  assert PLAN.most == 2**32
  assert PLAN.fits
  assert not dataclasses.replace(PLAN, filling=2**34).fits
  assert PLAN.streamed_seconds == pytest.approx(7)
  said = PLAN.to_json()
  assert (said["fits"], said["placing"]) == (True, 2**32)
  text = " ".join(growth_table(PLAN).split())
  for part in (
    "scale_out on v5e:2x2, mesh data 1, fsdp 4",
    "while the training's state is made 4.00 GiB",
    "fits yes",
    "the source, with moments 1.00 GiB",
    "seconds, on 2 CPU cores 7",
  ):
    assert part in text


def test_an_export_is_measured_before_it_is_written():
  sizes, read = plan_export(MODEL)
  # As in step_memory_test.py: table, head, layers, a norm.
  numbers = 2 * (192 + 384 + 16) + 2 * 808 + 8
  assert read == 4 * numbers
  assert sizes["bfloat16"].num_bytes == 2 * numbers
  assert sizes["float32"].num_bytes == sizes["float32"].largest_shard == read
  assert sizes["float32"].num_shards == 1
  cut = measure(MODEL, dtype="float32", max_shard_bytes=4 * 808)
  assert cut.num_shards > 2
  assert cut.largest_shard == 4 * 808
  text = export_table(sizes, read=read)
  assert "bfloat16" in text
