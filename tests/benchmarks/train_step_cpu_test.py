"""The training step beside others: workers in turn, and who is compared."""

from __future__ import annotations

import sys
from typing import Any

import jax
import pytest

from aquila_jax.models import decoder_lm
from benchmarks import train_step_cpu
from benchmarks.step_workers import aquila, shape
from benchmarks.step_workers.protocol import Worker

_COUNTS = """
from benchmarks.step_workers.protocol import serve
def start():
  print("noise of a library")
  seen = []
  def step():
    seen.append(0)
    return float(len(seen))
  return step, dict(parameters=3)
serve({"counts": start})
"""


def test_a_worker_steps_when_it_is_asked():
  worker = Worker([sys.executable, "-c", _COUNTS], environment={})
  first = worker.start("counts")
  assert (first["parameters"], first["last"]) == (3, 1.0)
  later = worker.run("counts", steps=4)
  assert later["last"] == 5.0 and later["seconds"] >= 0
  worker.close()
  assert worker.process.returncode == 0


def test_a_worker_that_ends_is_named():
  command = [sys.executable, "-c", "pass"]
  with pytest.raises(RuntimeError) as caught:
    Worker(command, environment={})
  assert str(caught.value) == f"a worker ended on its start: {command}"


def _case(side: str, allocator: str, model: str, seconds: list[float]):
  return train_step_cpu.Case(
    side=side,
    allocator=allocator,
    model=model,
    flops=1.0,
    worker=None,  # pyright: ignore[reportArgumentType]
    seconds=seconds,
  )


def test_ratios_are_of_each_sides_best_allocator():
  cases = [
    _case("aquila_jax", "default", "dropless", [4.0, 4.0, 4.0]),
    _case("aquila_jax", "tuned", "dropless", [2.0, 2.0, 4.0]),
    _case("transformers", "default", "mixtral", [1.0, 3.0, 4.0]),
    _case("transformers", "tuned", "mixtral", [9.0, 9.0, 9.0]),
  ]
  assert train_step_cpu._comparisons(cases) == [
    dict(
      model="dropless",
      peer="transformers",
      allocators=["tuned", "default"],
      # 1/2, 3/2, 4/4
      ratio=1.0,
      ratio_range=[0.5, 1.5],
      bar=0.9,
    )
  ]


def test_all_sides_have_as_many_parameters():
  def parameters(case: str) -> int:
    shapes: Any = decoder_lm.abstract_params(aquila.model(case))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

  # Table and head; q and out, k and v; norms. As the peers' workers say.
  width, layers = shape.WIDTH, shape.LAYERS
  shared = 2 * 8192 * width + width + layers * (2 * 256 + 2 * 64 + 2) * width
  ffn = 3 * width * shape.EXPERT_WIDTH
  assert parameters("dense") == shared + layers * 2 * ffn == 11_143_424
  mixture = layers * (8 * ffn + 8 * width)
  assert parameters("dropless") == shared + mixture == 30_025_984
