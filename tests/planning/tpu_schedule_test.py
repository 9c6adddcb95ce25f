"""The schedule's reader, on text in the compiler's form, counted by hand.

What the compiler itself writes is read by `make tpu`.
"""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from aquila_jax.planning import tpu_schedule

# Five bundles outside, a grid of 2 x 4 around 3 bundles and, in it, 4 bundles
# of a loop from 0 by 2 to 6. One of these is empty, and so does not tell its
# depth; one has an instruction of the loop around it alone.
GRID = """\
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov 0  ;;  %s2_s1 = smov (!%p9_p9), 0 }
   0x1   :  { %v1_v0 = vld [vmem:[%s1_s0] sm:$0xff] }
   0x2   :  {}
   0x3 LB: > { %s4_s2 = sphi %s1_s0, %s5_s2 /* phi copy :: iteration index */ }
   0x4 LB: >> { %s6_s3 = sphi %s2_s1, %s7_s3 /* phi copy */  ;;  %s7_s3 = sadd.s32 2, %s6_s3 /* copy */ }
   0x5   :  {}
   0x6   : > { %s5_s2 = sadd.s32 1, %s4_s2 }
   0x7   : >> { %p8_p0 = scmp.ge.s32.totalorder %s7_s3, 6 /* loop exit test */  ;;  %20 = vst [vmem:[#allocation3_spill] sm:$0xff] /*vst_source=*/%v1_v0 }
   0x8   : > { %v2_v0 = vld [vmem:[#allocation3_spill] sm:$0xff] }
iteration_bounds: (2, 4)
   0x9   : > { %p9_p1 = scmp.ge.s32.totalorder %s5_s2, 10 /* loop exit test */ }
   0xa   :  { %21 = vsyncpa [#allocation3], 1 }
   0xb   :  { %22 = vsyncpa [#allocation3], 1 }
"""  # noqa: E501

# A pipeline of 6 trips for 4 tiles, without a line for its grid; and a loop
# whose bound is read from memory.
PIPELINE = """\
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s3_s1 /* iteration index, stage = 0 */  ;;  %s3_s1 = sadd.s32 1, %s2_s1 }
   0x2   : > { %p4_p0 = scmp.ge.s32.totalorder %s3_s1, 6 /* loop exit test */ }
   0x3   :  { %s9_s5 = sld [smem:[#allocation1]] }
   0x4   :  { %s9_s6 = smov 0 }
   0x5   :  { %s9_s7 = smov 0 }
   0x6   :  { %s9_s8 = smov 0 }
   0x7   :  { %s9_s9 = smov 0 }
   0x8 LB: > { %s5_s1 = sphi %s1_s0, %s6_s1  ;;  %s6_s1 = sadd.s32 1, %s5_s1 }
   0x9   : > { %p7_p0 = scmp.ge.s32.totalorder %s6_s1, %s9_s5 }
"""  # noqa: E501

# A grid of 3 by a number that the program computes. A jump passes over two
# bundles, with three matrix instructions; the second one leads back.
BRANCH = """\
iteration_bounds: (3, 2147483647)
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s3_s1 }
   0x2   : > { %20 = sbr.rel (!%p4_p0) target = $region7 }
   0x3   : > { %21 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %22 = vmatmul.bf16.gmra.mxu1 %v2 }
   0x4   : > { %23 = vmatmul.bf16.gmra.mxu0 %v3 }
   0x5 PF: > { %s3_s1 = sadd.s32 1, %s2_s1 } /* Start/End empty region 7 :: End region 6 */
   0x6   : > { %24 = sbr.rel (!%p5_p1) target = $region2 }
"""  # noqa: E501


def test_bundles_count_as_often_as_their_loops_run():
  kernel = tpu_schedule.parse(GRID, name="f")
  assert kernel.bundles == 12
  assert [(loop.depth, loop.trips) for loop in kernel.loops] == [(1, 8), (2, 3)]
  # Outside 0, 1, 2, a, b; grid 3, 8, 9; inner 4, 5, 6, 7.
  assert kernel.cycles == 5 + 8 * (3 + 4 * 3)
  assert kernel.spills == 2
  assert not kernel.unknown_loops


def test_loops_in_a_grid_of_one_are_outermost():
  text = GRID.replace("(2, 4)", "(1, 1)").replace("0x3 LB: >", "0x3   :")
  kernel = tpu_schedule.parse(text.replace(">>", ">"), name="f")
  assert [(loop.depth, loop.trips) for loop in kernel.loops] == [(1, 3)]


def test_a_pipelines_own_trips_do_not_count_and_unknown_ones_are_named():
  kernel = tpu_schedule.parse(PIPELINE, name="f")
  assert [loop.trips for loop in kernel.loops] == [4, None]
  assert kernel.unknown_loops == kernel.loops[1:]
  assert kernel.cycles == 6 + 2 * 4 + 2
  schedule = tpu_schedule.Schedule(kernels=(kernel, kernel))
  assert schedule.cycles == 2 * kernel.cycles
  assert not schedule.is_complete


def test_branches_and_products_are_found_and_a_dynamic_grid_is_unknown():
  kernel = tpu_schedule.parse(BRANCH, name="f")
  assert [(b.start, b.end, b.bundles) for b in kernel.branches] == [(3, 5, 2)]
  assert kernel.products == (0, 0, 0, 2, 1, 0, 0)
  assert [(loop.trips, loop.known_trips) for loop in kernel.loops] == [
    (None, 3)
  ]
  assert kernel.unknown_loops == kernel.loops


def _tiles(trips: int | None) -> tpu_schedule.Kernel:
  """Of 10 bundles in a grid of 3 by something, with one branch or another."""
  return tpu_schedule.Kernel(
    name="f",
    bundles=14,
    cycles=4 + 10 * (trips or 1),
    loops=(
      tpu_schedule.Loop(start=2, end=12, depth=1, trips=trips, known_trips=3),
      tpu_schedule.Loop(start=3, end=5, depth=2, trips=None),
    ),
    spills=0,
    # All of it; two with matrix instructions, and one without.
    branches=tuple(
      tpu_schedule.Branch(start=start, end=end)
      for start, end in ((2, 12), (3, 6), (6, 8), (8, 12))
    ),
    products=(0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0),
  )


def test_one_of_the_branches_that_multiply_is_taken():
  # Of those of 3 and 2 bundles the longer: 8 bundles a step.
  assert _tiles(trips=5).cycles_of(99) == 4 + 5 * 8
  assert _tiles(trips=None).cycles_of(7) == 4 + 3 * 7 * 8


@pytest.mark.parametrize(
  ("taken", "step"),
  [
    (tpu_schedule.Taken(), 8),
    # 3 bundles of the longer one that computes; 2 around, and 3 without.
    (tpu_schedule.Taken(computing=0.5), 8 - 1.5),
    (tpu_schedule.Taken(others=0.25), 8 - 0.75 * 4),
    (tpu_schedule.Taken(computing=0.0, others=0.0), 1),
  ],
)
def test_branches_count_as_often_as_they_are_taken(taken, step):
  assert _tiles(trips=10).cycles_of(99, taken=taken) == 4 + 10 * step


def test_a_step_takes_as_long_as_its_matrix_instructions():
  kernel = dataclasses.replace(
    _tiles(trips=5), products=(0, 0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0)
  )
  assert kernel.cycles_of(99) == 4 + 5 * 4 * 3


@pytest.mark.parametrize(
  ("topology", "links"),
  [
    ("v5p:2x2x1", {}),
    ("v5p:4x4x4", dict(wrap=(True, True, True))),
    ("v6e:8x16", dict(wrap=(False, True, False))),
    ("v6e:8x8", {}),
  ],
)
def test_whole_cubes_are_closed_to_rings(topology, links):
  assert tpu_schedule._links(topology) == links


def test_only_kernels_are_read(tmp_path: pathlib.Path):
  for name in (
    "12-fusion.1-65-final_bundles.txt",
    "12-fusion.1-64-schedule-analysis_final_bundles.txt",
    "13-<late-finalization>-68-final_bundles.txt",
    "14-TLP-73-final_bundles.txt",
    "15-fusion.1-hlo.txt",
  ):
    (tmp_path / name).write_text(GRID, encoding="utf-8")
  assert [kernel.name for kernel in tpu_schedule.read(tmp_path)] == ["fusion.1"]


def test_flags_of_another_user_of_the_compiler_are_refused(monkeypatch):
  monkeypatch.setattr(tpu_schedule.Clock, "_folder", None)
  flags = "--xla_jf_dump_to=elsewhere"
  monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
  with pytest.raises(RuntimeError) as error:
    tpu_schedule.Clock("v6e:2x2")
  assert str(error.value) == (
    f"LIBTPU_INIT_ARGS={flags!r}: a clock sets --xla_jf_dump_to itself"
  )


def test_memory_is_of_the_compilers_report(tmp_path):
  assert tpu_schedule.total_bytes(tmp_path) is None
  for module, size in (("0001.jit_f.", 12583424), ("0000.jit_g.cpu_", 10**12)):
    name = f"module_{module}after_optimizations-memory-usage-report.txt"
    text = f"Memory Space: default (color=0)\nTotal bytes: {size} (1.00GiB)\n"
    (tmp_path / name).write_text(text)
  assert tpu_schedule.total_bytes(tmp_path) == 12583424
