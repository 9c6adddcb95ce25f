"""An estimate of a program whose time can be added up by hand."""

from __future__ import annotations

import itertools

import pytest

from aquila_jax.planning.tpu_program import Chip, estimate, kernel_names

# A cycle is a second, and so is a byte of memory; a dimension of the torus
# takes two bytes a second.
CHIP = Chip(cycles=1.0, flops=1.0, memory_bytes=1.0, link_bytes=2.0)
TORUS = [(x, y, z) for z, y, x in itertools.product(range(2), repeat=3)]

# ruff: noqa: E501
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (param.1: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} add(%param.1, %param.1), backend_config={"window_config":{"estimated_cycles":"1000"}}
}

%body (param: (s32[], f32[8])) -> (s32[], f32[8]) {
  %param = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%param), index=1
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/layer"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  %kernel.1 = f32[8]{0} custom-call(%fusion.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"tiles": [1]
}}, backend_config={"custom_call_config":{"body":"TUx(("}}
  %all-reduce.1 = f32[8]{0} all-reduce(%kernel.1), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %tuple = (s32[], f32[8]) tuple(%x, %all-reduce.1)
}

%condition (param.2: (s32[], f32[8])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(5)
  %counter = s32[] get-tuple-element(%param.2), index=0
  ROOT %compare = pred[] compare(%counter, %constant.9), direction=LT
}

%open (param.3: (s32[], f32[8])) -> pred[] {
  ROOT %compare.1 = pred[] compare(%counter, %limit), direction=LT
}

%short (param.4: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%param.4), backend_config={"window_config":{"estimated_cycles":"2"}}
}

%long (param.5: f32[8]) -> f32[8] {
  ROOT %m = f32[8]{0} negate(%param.5), metadata={op_name="jit(step)/transpose(jvp(overflow))/neg"}, backend_config={"window_config":{"estimated_cycles":"3"}}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %copy-start.1 = (f32[8], f32[8], u32[]) copy-start(%a)
  %copy-done.1 = f32[8] copy-done(%copy-start.1)
  %while.1 = (s32[], f32[8]) while(%tuple.0), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]) while(%while.1), condition=%open, body=%body
  %conditional.1 = f32[8] conditional(%p, %a, %a), branch_computations={%short, %long}
  %all-gather-start.1 = (f32[8], f32[64]) all-gather-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %all-gather-done.1 = f32[64] all-gather-done(%all-gather-start.1)
  %reduce-scatter.1 = bf16[8] reduce-scatter(%all-gather-done.1), replica_groups=mesh['i'=2,'j'=4] {'j'}, to_apply=%add
  %collective-permute.1 = u8[6] collective-permute(%small), source_target_pairs={{0,1},{1,0}}
  %all-to-all.1 = bf16[8] all-to-all(%all-gather-done.1), replica_groups=[2,4]<=[8]
  %ragged-all-to-all.1 = u8[6] ragged-all-to-all(%small), replica_groups=[1,8]<=[8]
  %small = u8[6] iota(), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %twin.1 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/experts/pallas_call"}, backend_config={"custom_call_config":{"body":"TUx((","cost_estimate":{"flops":"1","bytes_accessed":"40"}}}
  ROOT %sort = f32[8]{0} sort(%a), dimensions={0}
}
"""


def _estimate(**arguments):
  return estimate(TEXT, chip=CHIP, coordinates=TORUS, **arguments)


def test_every_part_counts_as_often_as_it_runs():
  found = _estimate(kernel_cycles={"kernel.1": 11})
  # The loop of 5, and one whose trips are not known; the longer branch.
  assert found.seconds("estimate") == (5 + 1) * 7 + 3
  # And one that has no schedule of its own, but the same body, and 40 bytes.
  assert found.seconds("schedule") == (5 + 1) * 11 + 40
  # 32 bytes in, 32 out; and six of which the compiler knows nothing.
  assert found.seconds("bytes") == 64 + 6
  assert found.unknown_kernels == ()
  assert found.unknown_loops == ("while.2",)
  fusion = next(part for part in found.parts if part.name == "fusion.1")
  assert (fusion.trips, fusion.op_name) == (5, "jit(step)/layer")


def test_a_kernel_takes_no_less_than_the_bytes_that_it_moves():
  """By its name a share of what it says, as of rows of a buffer."""

  def seconds(share):
    found = _estimate(
      kernel_cycles={"kernel.1": 11},
      moved_share=lambda name: share if "experts" in name else 1.0,
    )
    return next(part for part in found.parts if part.name == "twin.1").seconds

  assert seconds(0.5) == 20
  assert seconds(0.25) == 11


@pytest.mark.parametrize(
  ("rare", "cycles"),
  [(["overflow"], 2), (["over"], 3), (["other", "overflow"], 2), ([], 3)],
)
def test_a_branch_that_is_rare_does_not_count(rare, cycles):
  found = _estimate(kernel_cycles={"kernel.1": 11}, rare=rare)
  assert found.seconds("estimate") == (5 + 1) * 7 + cycles


def test_collectives_are_by_the_links_of_their_group():
  collectives = _estimate().collectives()
  assert collectives == {
    # 32 bytes, twice, between neighbours along one dimension.
    "all-reduce": (6, 6 * 32, 6 * 2 * 32 / 2),
    # 256 bytes, along all three.
    "all-gather": (1, 256, 256 / 6),
    # Of 256 bytes, 16 stay; within a plane.
    "reduce-scatter": (1, 256, 256 / 4),
    # In one direction.
    "collective-permute": (1, 6, 6 / 1),
    # Of 256 bytes of a device, half go over a link of a ring of two.
    "all-to-all": (1, 256, 256 * 2 / (4 * 2)),
    "ragged-all-to-all": (1, 6, 6 * 2 / (4 * 2)),
  }


def test_an_all_to_all_is_by_the_longest_ring_of_its_group():
  torus = [(x, y, 0) for y, x in itertools.product(range(2), range(4))]
  found = estimate(TEXT, chip=CHIP, coordinates=torus).collectives()
  # A ring of four; then four by two, whose rings work at the same time.
  assert found["all-to-all"][2] == 256 * 4 / (4 * 2)
  assert found["ragged-all-to-all"][2] == 6 * 4 / (4 * 2)


def test_sums():
  found = _estimate(kernel_cycles={"kernel.1": 11})
  links = 6 * 32 + 256 / 6 + 64 + 6 + 64 + 1.5
  compute = 45 + 106 + 70
  assert found.seconds("link") == pytest.approx(links)
  assert found.without_overlap == pytest.approx(compute + links)
  assert found.with_full_overlap == pytest.approx(links)
  assert found.with_full_overlap > compute


def test_a_kernel_without_a_schedule_is_named():
  found = _estimate()
  assert found.unknown_kernels == ("kernel.1", "twin.1")
  # But for the bytes that the one says it moves.
  assert found.seconds("schedule") == 40


def test_groups_by_rows_of_a_transposed_mesh():
  text = TEXT.replace("[4,2]<=[8]", "[2,4]<=[2,2,2]T(2,0,1)")
  found = estimate(text, chip=CHIP, coordinates=TORUS)
  # Devices 0, 2, 4, 6: a plane.
  assert found.collectives()["all-reduce"][2] == 6 * 2 * 32 / 4


def test_chips_by_the_names_of_jax():
  assert Chip.of("TPU v5").flops == 4.59e14
  with pytest.raises(KeyError):
    Chip.of("TPU v1")


def _fusion(name: str, *lines: str) -> str:
  return "\n".join((f"%{name} (p: f32[8]) -> f32[64] {{", *lines, "}", ""))


_GATHER = (
  "  %gather.{0} = f32[64] all-gather(%p), channel_id={0},"
  " replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}"
)
# Two that start, one after the other: the first goes on in a product and in a
# kernel, the second in the same kernel; the third is never waited for.
OVERLAPPED = "HloModule jit_step, is_scheduled=true\n\n" + "\n".join(
  (
    *(
      _fusion(
        f"start.{channel}",
        "  %p = f32[8] parameter(0)",
        _GATHER.format(channel),
        f"  ROOT %s.{channel} = f32[64] custom-call(%gather.{channel}),"
        ' custom_call_target="AsyncCollectiveStart"',
      )
      for channel in (3, 4, 5)
    ),
    *(
      _fusion(
        f"done.{channel}",
        "  %p = f32[8] parameter(0)",
        _GATHER.format(channel),
        f"  ROOT %d.{channel} = f32[64] custom-call(%p, %gather.{channel}),"
        ' custom_call_target="AsyncCollectiveDone"',
      )
      for channel in (3, 4)
    ),
    _fusion(
      "product",
      "  %p = f32[8] parameter(0)",
      _GATHER.format(3),
      "  ROOT %dot = f32[8] convolution(%p, %p)",
    ),
    _fusion(
      "both",
      "  %p = f32[8] parameter(0)",
      _GATHER.format(3),
      _GATHER.format(4),
      '  ROOT %kernel.1 = f32[8] custom-call(%p), custom_call_target="tpu_custom'
      '_call", backend_config={"custom_call_config": {"body": "TUx(("}}',
    ),
    "ENTRY %main (a: f32[8]) -> f32[8] {",
    "  %a = f32[8]{0} parameter(0)",
    *(
      f"  %s.{channel} = f32[64] fusion(%a), kind=kCustom,"
      f" calls=%start.{channel}"
      for channel in (3, 4, 5)
    ),
    "  %f.1 = f32[8] fusion(%a), kind=kOutput, calls=%product,"
    ' backend_config={"window_config":{"estimated_cycles":"20"}}',
    "  %f.2 = f32[8] fusion(%a), kind=kCustom, calls=%both",
    "  %f.3 = f32[64] fusion(%a), kind=kCustom, calls=%done.3",
    "  %f.4 = f32[64] fusion(%a), kind=kCustom, calls=%done.4",
    "  ROOT %add = f32[8]{0} add(%a, %a), backend_config="
    '{"window_config":{"estimated_cycles":"100"}}',
    "}",
    "",
  )
)


def test_collectives_hide_behind_what_they_are_fused_into():
  found = estimate(
    OVERLAPPED,
    chip=CHIP,
    coordinates=TORUS,
    kernel_cycles={"kernel.1": 999, "f.2": 30},
  )
  link = 256 / 6  # 42.7
  assert found.unknown_kernels == ()
  # By the name of the fusion, with whose steps it is compiled.
  assert found.seconds("schedule") == 30
  assert found.seconds("estimate") == 120
  assert found.collectives() == {"all-gather": (3, 3 * 256, 3 * link)}
  assert found.without_overlap == pytest.approx(150 + 3 * link)
  # 20 s of the first beside the product and 22.7 beside the kernel, whose other
  # 7.3 the second has; nothing beside what they are not fused into.
  assert found.as_scheduled == pytest.approx(150 + 3 * link - 20 - 30)
  assert kernel_names(OVERLAPPED) == {"kernel.1", "f.2"}


def test_a_kernel_that_was_not_read_by_its_fusion_is_by_its_own_name():
  found = estimate(
    OVERLAPPED, chip=CHIP, coordinates=TORUS, kernel_cycles={"kernel.1": 40}
  )
  assert found.seconds("schedule") == 40
  nothing = estimate(OVERLAPPED, chip=CHIP, coordinates=TORUS)
  assert nothing.unknown_kernels == ("f.2",)


def test_what_starts_and_ends_at_once_hides_nothing():
  found = _estimate(kernel_cycles={"kernel.1": 11})
  assert found.as_scheduled == pytest.approx(found.without_overlap)
