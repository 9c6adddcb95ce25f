"""A roofline by hand, and a search whose best can be told."""

from __future__ import annotations

import dataclasses

import pytest

from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.planning import counting, plan_search
from aquila_jax.planning.pods import Pod
from aquila_jax.planning.quick_plan import QuickPlan, search_table
from aquila_jax.planning.step_memory import Step, leaves
from aquila_jax.planning.step_time import EXPERT_RATES, RATES, step_time
from aquila_jax.sharding.mesh import abstract_mesh
from tests.planning.step_memory_test import MIXTURE, MODEL, TRAIN

POD = Pod.of("v5p:2x2x1")
WIDE = dataclasses.replace(MODEL, embed_dim=64, mlp_dim=128)


def _step(model, train=TRAIN, **sizes) -> Step:
  mesh = abstract_mesh(MeshConfig(**sizes), num_devices=4)
  return Step(model=model, train=train, mesh=mesh)


def test_compute_is_by_what_is_computed_again():
  counted = counting.count(MODEL, sequence_length=8)
  total, head = counted.total, counted.parts["lm_head"]
  found = step_time(_step(MODEL, data=1, fsdp=4), POD)
  # 64 tokens, of which a device has 16.
  assert found.flops == pytest.approx(16 * counted.train_flops / 4.59e14)
  computed = counted.train_flops + total.forward_flops - head.forward_flops
  assert found.compute == pytest.approx(
    16 * computed / (4.59e14 * RATES["TPU v5"])
  )
  kept = dataclasses.replace(MODEL, remat="none")
  found = step_time(_step(kept, data=1, fsdp=4), POD)
  assert found.compute == pytest.approx(found.flops / RATES["TPU v5"])


def test_links_gather_kernels_and_sum_gradients():
  step = _step(WIDE, data=1, fsdp=4)
  head = table = 64 * 101
  whole = sum(leaf.numbers(step.mesh, gathered=True) for leaf in leaves(WIDE))
  layers = whole - head - table
  # Two rings of two; bfloat16. Twice forward, and an all-reduce is two.
  seconds = (4 * layers + 3 * head) * 2 / (2 * 1.8e11)
  assert step_time(step, POD).links == pytest.approx(2 * seconds)


def test_rows_go_to_experts_and_back():
  one = dataclasses.replace(TRAIN, num_microbatches=1)
  step = _step(MIXTURE, one, data=1, fsdp=1, expert=4)
  # 16 tokens of two experts each, and half as many slots again; a block more.
  assert step.rows() == 48 + 3
  sent = 51 * 8 * 2
  # A ring of two in either dimension; six times a layer.
  assert step_time(step, POD).links == pytest.approx(
    2 * 6 * sent * 2 / (4 * 1.8e11)
  )


def test_microbatches_gather_again_and_read_for_the_load():
  one, two = (
    step_time(
      _step(
        WIDE, dataclasses.replace(TRAIN, num_microbatches=n), data=1, fsdp=4
      ),
      POD,
    )
    for n in (1, 2)
  )
  assert two.links == pytest.approx(2 * one.links)
  assert two.compute == pytest.approx(one.compute)
  assert two.without_overlap > one.without_overlap
  assert two.mfu < one.mfu
  # Under a global balance loss, all of them forward once more.
  mixed = _step(MIXTURE, data=1, fsdp=4)
  running = dataclasses.replace(
    TRAIN, loss=dataclasses.replace(TRAIN.loss, balance_over="running")
  )
  apart = _step(MIXTURE, running, data=1, fsdp=4)
  counted = counting.count(MIXTURE, sequence_length=8)
  body = counted.total.forward_flops - counted.parts["lm_head"].forward_flops
  more = step_time(mixed, POD).compute - step_time(apart, POD).compute
  experts = counted.parts["experts"].forward_flops
  # Rows of experts in tiles of 512, of which one more is computed an expert.
  seconds = experts * mixed.tile_share(512) / EXPERT_RATES["TPU v5"]
  seconds += (body - experts) / RATES["TPU v5"]
  assert more == pytest.approx(16 * seconds / 4.59e14)


def test_gradients_of_experts_are_scattered():
  """To each device its part, in half the time of an all-reduce."""
  step = _step(MIXTURE, data=1, fsdp=4)
  seconds = 0.0
  for leaf in leaves(MIXTURE):
    numbers = leaf.numbers(step.mesh, gathered=True)
    if numbers == leaf.numbers(step.mesh) or leaf.axes.has(
      "vocab", Role.NEITHER
    ):
      continue
    head = leaf.axes.has("vocab", Role.WRITES)
    passes = 3 if head else 3 + (not leaf.axes.has("expert"))
    # The load of all microbatches is read before, but for the head.
    passes += not head
    seconds += passes * numbers * 2 / (2 * 1.8e11)
  assert step_time(step, POD).links == pytest.approx(2 * seconds)


def test_a_search_ranks_what_fits():
  found = plan_search.search("dense", WIDE, TRAIN, POD)
  times = [plan.time.without_overlap for plan in found]
  assert times == sorted(times)
  assert all(plan.memory.fits for plan in found)
  # Of so small a model everything fits: nothing is computed twice.
  assert found[0].step.model.remat == "none"
  assert found[0].step.train.num_microbatches == 1
  # Every mesh of 4 that divides 8 rows, one or two key heads, and no experts.
  meshes = {tuple(plan.step.mesh.shape.values()) for plan in found}
  assert (1, 4, 1, 1, 1) in meshes
  assert (4, 1, 1, 1, 1) in meshes
  assert (1, 1, 1, 4, 1) in meshes
  assert not any(plan.step.mesh.shape["expert"] > 1 for plan in found)
  assert not any(plan.step.mesh.shape["tensor"] > 1 for plan in found)
  text = search_table(found[:2], ["first", "second"])
  assert "  1 first\n  2 second" in text


def test_a_search_leaves_out_what_does_not_fit():
  large = dataclasses.replace(WIDE, vocab_size=2**20)
  long = dataclasses.replace(TRAIN, batch_size=2**14, num_microbatches=1)
  pod = Pod.of("v5e:2x2")
  found = plan_search.search("dense", large, long, pod)
  # Logits of all rows, 6 bytes each, would be 192 GiB.
  assert found
  assert all(plan.step.train.num_microbatches >= 16 for plan in found)
  too_much = QuickPlan.of(
    "dense",
    Step(
      model=large,
      train=long,
      mesh=abstract_mesh(MeshConfig(data=4), num_devices=4),
    ),
    pod,
  )
  assert not too_much.memory.fits


def test_all_meshes_of_a_pod():
  dense = list(plan_search.meshes(4, MODEL))
  # 4 as four ordered factors; as five with `expert`.
  assert len(dense) == 10
  assert len(list(plan_search.meshes(4, MIXTURE))) == 15
