"""The runner of the reproduction in miniature, and the page of its results."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from etils import epath

from aquila_jax.cli import config_door
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.growth.scale_out import plan_scale_out
from aquila_jax.pipeline import budget
from benchmarks.reproduce_scale_out import catching_up, experts, page, smoke
from benchmarks.reproduce_scale_out.run import run
from benchmarks.reproduction.job import Job

CONFIG = "experiments/configs/reproduce_scale_out.py"
UPCYCLED = [arm for arm in page.ARMS if arm not in ("dense", "scratch")]


class _Killed(BaseException):
  """Nobody catches it, as nobody catches a SIGKILL."""


@pytest.fixture(scope="module")
def experiment():
  return config_door.load_file(CONFIG)


def _job(workdir: pathlib.Path, say) -> Job:
  """Dense and one mixture of two layers: what compiles is most of the time."""
  whole = smoke.shrunk(config_door.load_file(CONFIG))
  names = ("source", "dense", "drop_50")
  stages = {
    name: dataclasses.replace(
      whole.stages[name],
      model=dataclasses.replace(whole.stages[name].model, num_layers=2),
    )
    for name in (*names, "scratch")  # which is counted, not trained
  }
  return Job(
    experiment=dataclasses.replace(whole, pipeline=names, stages=stages),
    workdir=epath.Path(workdir),
    seeds=(0,),
    output=workdir / "results.json",
    page=workdir / "page.md",
    say=say,
  )


@pytest.mark.long
def test_a_killed_run_goes_on_and_does_nothing_twice(tmp_path):
  said: list[str] = []

  def say_until_the_mixture_is_written(line: str) -> None:
    said.append(line)
    if line.startswith("drop_50: wrote"):
      raise _Killed

  with pytest.raises(_Killed):
    run(_job(tmp_path, say_until_the_mixture_is_written))
  before = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
  assert list(before["seeds"]["0"]["stages"]) == ["source", "dense"]
  for _ in range(2):  # the second finds everything done
    run(_job(tmp_path, said.append))

  for words in (": wrote ", ": compared its experts"):
    done = [line.split(":")[0] for line in said if words in line]
    arms = ["drop_50"]
    assert done == (arms if "experts" in words else ["source", "dense", *arms])
  results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
  found = results["seeds"]["0"]
  _check_losses(results, found["stages"])
  _check_experts(found["experts"])
  text = (tmp_path / "page.md").read_text(encoding="utf-8")
  assert "Done so far: 1 seeds." in text and "{" not in text


def _check_losses(results: dict[str, Any], stages: dict[str, Any]) -> None:
  dense, mixture = results["models"]["dense"], results["models"]["drop_50"]
  # 600 and 435 steps by 75; validated every 4 and at the end. All is counted.
  assert "scratch" in results["models"] and "scratch" not in stages
  assert (dense["steps"], mixture["steps"]) == (8, 6)
  places = [at for at, _ in stages["drop_50"]["curve"]]
  step = mixture["step_flops"]
  assert places == [0, 4 * step, 6 * step]
  assert places[-1] == mixture["flops"]
  last = stages["drop_50"]["validation"]
  assert last["overall"] == stages["drop_50"]["curve"][-1][1]
  assert set(last) == set(stages["dense"]["test"]) == {"overall", "en", "zh"}
  # Units drawn anew: not the function of the source.
  source = stages["source"]["validation"]["overall"]
  assert abs(stages["drop_50"]["start"] - source) > 1e-3
  assert stages["dense"]["start"] == source
  assert stages["source"]["start"] is None
  assert 0 < stages["drop_50"]["agreement"]["share"] < 1


def _check_experts(rows: list[dict[str, Any]]) -> None:
  assert [(row["arm"], row["when"]) for row in rows] == [
    ("drop_50", "start"),
    ("drop_50", "end"),
  ]
  for row in rows:
    for what, expected in (("between", 1 / 4), ("parent", 1 / 2)):
      assert list(row[what]) == ["down", "gate", "up"]
      # Of two experts a quarter of the units is the same. 36 units a parent, of
      # 24 values each: the deviation of a cosine is about 1 / sqrt(864).
      found = np.mean([row[what][kernel] for kernel in row[what]])
      assert found == pytest.approx(expected, abs=3 / math.sqrt(864))
    assert all(1 <= value <= 8 for value in row["max_over_mean"])


def test_arms_spend_the_same_flops_and_scratch_those_of_the_source_too(
  experiment,
):
  step = {n: budget.step_flops(s) for n, s in experiment.stages.items()}
  spent = {n: budget.total_steps(experiment, n) * step[n] for n in step}
  for arm in UPCYCLED:
    assert abs(spent[arm] - spent["dense"]) <= step[arm] / 2, arm
  together = spent["source"] + spent["dense"]
  assert abs(spent["scratch"] - together) <= step["scratch"] / 2
  assert spent["dense"] == pytest.approx(spent["source"] / 3)
  # What the config's docstring says.
  assert spent["source"] == pytest.approx(1.46e13, rel=0.01)
  assert spent["dense"] == pytest.approx(4.88e12, rel=0.01)
  upcycled = sum(spent[arm] for arm in UPCYCLED)
  assert upcycled == pytest.approx(3.42e13, rel=0.01)
  assert spent["scratch"] == pytest.approx(1.95e13, rel=0.01)
  dense = spent["source"] + spent["dense"]
  mixtures = upcycled + spent["scratch"]
  minutes = (dense / 32e9 + mixtures / 30e9) / 60
  assert minutes == pytest.approx(40, abs=0.5)
  assert step["dense"] == pytest.approx(8.1e9, rel=0.01)
  assert step["sparse_upcycling"] == pytest.approx(1.12e10, rel=0.005)
  assert step["shared"] == pytest.approx(1.12e10, rel=0.005)
  assert step["granular"] == pytest.approx(1.13e10, rel=0.005)


def test_schedules_are_the_same_shares_of_the_steps(experiment):
  for name, stage in experiment.stages.items():
    steps = budget.total_steps(experiment, name)
    optimizer = stage.train.optimizer
    # A whole number of steps.
    assert 0 <= steps / 20 - optimizer.warmup_steps < 1, name
    assert optimizer.schedule == "cosine" and optimizer.final_ratio == 0.1


def test_mixtures_have_equal_active_units_and_are_exact_where_said(experiment):
  source = experiment.stages["source"].model
  exact = []
  for arm in UPCYCLED:
    stage = experiment.stages[arm]
    moe = stage.model.moe
    units = moe.top_k * stage.model.mlp_dim + moe.shared_expert_dim
    every = moe.num_experts * stage.model.mlp_dim + moe.shared_expert_dim
    assert (units, every) == (2 * source.mlp_dim, 8 * source.mlp_dim), arm
    assert isinstance(stage.init, ScaleOut)
    plan = plan_scale_out(source, stage.model, stage.init)
    if plan.exactness.exact:
      exact.append(arm)
  assert exact == ["sparse_upcycling", "granular", "shared"]
  sparse = experiment.stages["sparse_upcycling"].model
  assert experiment.stages["scratch"].model == sparse
  assert set(page.ARMS) == set(experiment.pipeline[1:])


def test_only_experts_of_one_group_are_compared():
  # Of one layer: 0 and 2 are equal, 1 and 3 opposite; across, at right angles.
  kernel = np.asarray([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -3.0]]])
  apart = experts.between(kernel[..., None], np.asarray([0, 1, 0, 1]))
  assert apart == pytest.approx([0.0])  # the mean of 1 and -1
  alone = experts.between(kernel[:, [0, 2], :, None], np.asarray([0, 0]))
  assert alone == pytest.approx([1.0])


def test_balance_of_even_load_is_one():
  model = ModelConfig(
    vocab_size=8, num_layers=2, embed_dim=4, mlp_dim=4, num_heads=1,
    num_kv_heads=1, head_dim=4, moe=MoeConfig(num_experts=4, top_k=1),
  )  # fmt: skip
  # Two layers, one row: all four experts; and the first twice, padding apart.
  chosen = np.asarray([[[[0], [1], [2], [3]]], [[[0], [0], [-1], [-1]]]])
  found = experts.balance(chosen, config=model)
  assert found["max_over_mean"] == [1.0, 4.0]
  assert found["entropy"] == pytest.approx([1.0, 0.0])


def _falling(last: float, count: int = 24) -> list[list[float]]:
  """2 + 3 f^-1/2 of f = last / count, ..., last, in units of 100 FLOPs."""
  places = [last * (i + 1) / count for i in range(count)]
  return [[100 * f, 2 + 3 * f**-0.5] for f in places]


def test_catching_up_is_measured_where_the_curve_gets_there():
  curve = [[10.0, 5.0], [20.0, 4.0], [30.0, 4.5], [40.0, 3.0]]
  assert catching_up.caught_up(curve, 4.25) == catching_up.Catch(flops=17.5)
  assert catching_up.reached(curve, 5.0) == 10.0
  assert catching_up.reached(curve, 2.9) is None
  assert catching_up.at(curve, 35.0) == pytest.approx(3.75)
  assert catching_up.at(curve, 5.0) is None


def test_catching_up_extrapolates_a_power_law_and_no_farther_than_it_says():
  curve = _falling(9.0)  # ends at a loss of 3; 2.75 is at f = 16
  found = catching_up.caught_up(curve, 2.75)
  assert found.flops == pytest.approx(1600, rel=1e-6)
  assert found.interval == pytest.approx((1600, 1600), rel=1e-6)
  assert found.in_words(800) == "2.00, extrapolated (2.00 to 2.00)"
  # 2.55 is at f = 29.8, more than three times 9; 2 is never reached.
  for loss in (2.55, 2.0):
    far = catching_up.caught_up(curve, loss)
    assert far == catching_up.Catch(flops=None)
    assert far.in_words(800) == ""


def test_catching_up_is_uncertain_where_the_curve_is_rough():
  random = np.random.default_rng(1)
  curve = [[f, y + 0.02 * random.normal()] for f, y in _falling(9.0)]
  found = catching_up.caught_up(curve, 2.75)
  assert found.flops is not None and found.interval is not None
  low, high = found.interval
  assert 900 < low < found.flops < high
  assert high - low > 50


def _results(seeds: int) -> dict[str, Any]:
  """Three arms; seed N lies 0.1 N above seed 0, and sparse gains with N."""

  def size(**given: Any) -> dict[str, Any]:
    return dict(
      layers=6, width=96, warmup_steps=3, experts=0, top_k=0, FFN=16,
      shared=0, parameters=12345, active=2345,
      learning_rate=1e-3, steps=10, tokens=20000, flops=1000.0,
      step_flops=100.0,
    ) | given  # fmt: skip

  def stage(*losses: float, start: float | None = None) -> dict[str, Any]:
    curve = [[500.0 * (i + 1), loss] for i, loss in enumerate(losses)]
    scores = dict(overall=losses[-1], zh=losses[-1] + 1, en=losses[-1] - 1)
    return dict(
      curve=([] if start is None else [[0.0, start]]) + curve, start=start,
      validation=scores, test=scores, wall_s=10.0, agreement=None,
    )  # fmt: skip

  def of_seed(seed: int) -> dict[str, Any]:
    more = 0.1 * seed
    sparse = stage(3.1 + more, 2.9 + 0.05 * seed, start=3.3 + more)
    sparse["agreement"] = dict(share=0.75, step=300, since_step=200)
    kernels = dict(gate=[1.0, 0.8], up=[0.5, 0.5], down=[0.25, 0.25])
    rows = [
      dict(
        arm="sparse_upcycling", when=when, between=kernels, parent=None,
        max_over_mean=[2.0, 3.0], entropy=[0.5, 0.7],
      )
      for when in ("start", "end")
    ]  # fmt: skip
    return dict(
      stages=dict(
        source=stage(3.3 + more),
        dense=stage(3.2 + more, 3.0 + more),
        sparse_upcycling=sparse,
        scratch=stage(4.0, 3.5, 3.2, 3.0, 2.95, 2.9),
      ),
      experts=rows,
    )

  mixture = size(experts=8, top_k=2, shared=4, flops=1040.0)
  return dict(
    date="2026-01-02",
    machine=dict(device="a CPU"),
    versions=dict(jax="1.2"),
    arms=["dense", "sparse_upcycling", "scratch"],
    models=dict(
      source=size(flops=3000.0),
      dense=size(),
      sparse_upcycling=mixture,
      scratch=mixture | dict(flops=3000.0),
    ),
    seeds={str(seed): of_seed(seed) for seed in range(seeds)},
  )


def test_page_has_means_deviations_and_paired_differences():
  text = page.render(_results(2), figure_name="page.svg")
  for line in (
    "Done so far: 2 seeds.",
    "6 layers of width 96, and a step has 2,000 tokens",
    "each arm spends 1e+03 FLOPs, 0.33 of what the source",
    "dense by at most 0.40 of one of their own steps",
    "| sparse upcycling | 2 of 8 | 16, shared 4 | 12,345 | 2,345 | 0.001 |"
    " 10, 3 | 20,000 | 1.0400 | 2,000 |",
    "| dense, continued | - | 3.050 ± 0.071 | 4.050 ± 0.071 | 2.050 ± 0.071 |",
    "| sparse upcycling | 3.350 ± 0.071 | 2.925 ± 0.035 |",
    # -0.1 and -0.15: t of one degree of freedom times 0.025 is 0.318.
    "| sparse upcycling | -0.125 ± 0.035 [-0.443, +0.193] |",
    "| -0.100, -0.150 | -0.100, -0.150 |",
    # Scratch has 3.0 at 2,000 FLOPs, and 3.1 halfway from 3.2 to there.
    "| dense, continued | 2.00 | 1.75 | 1.88 ± 0.18 | +0.450 ± 0.071",
    "| sparse upcycling | 0.900 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 |",
    "| 2.500 ± 0.000 | 2.500 ± 0.000 | 0.600 ± 0.000 | 0.600 ± 0.000 |"
    " 0.750 ± 0.000 | 200 to 300 |",
    "![Validation loss over FLOPs after the checkpoint](page.svg)",
    (pathlib.Path(page.__file__).parent / "words.md")
    .read_text("utf-8")
    .strip(),
  ):
    assert line in text
  assert "{" not in text


def test_page_of_one_seed_has_no_deviation_and_of_none_no_numbers():
  text = page.render(_results(1), figure_name="")
  assert " ± " not in text
  assert "| sparse upcycling | -0.100 | -0.100 |" in text
  assert page.render(_results(0), figure_name="").count("Not measured yet") == 7


def test_page_is_written_beside_its_figure(tmp_path):
  page.write(_results(2), tmp_path / "docs" / "found.md")
  drawing = (tmp_path / "docs" / "found.svg").read_text(encoding="utf-8")
  # Three arms: in the legend, and in each of two charts a mean and a band.
  assert drawing.count('class="line arm') == 3 * (1 + 2 * 2)
  assert drawing.count(' band"') == 3 * 2
  assert "(found.svg)" in (tmp_path / "docs" / "found.md").read_text("utf-8")


def test_committed_page_is_that_of_the_committed_results():
  path = pathlib.Path("benchmarks/results/reproduce_scale_out.json")
  if not path.exists():
    pytest.skip("not run yet")
  results = json.loads(path.read_text(encoding="utf-8"))
  committed = pathlib.Path("docs/reproduce_scale_out.md")
  expected = page.render(results, figure_name="reproduce_scale_out.svg")
  assert committed.read_text(encoding="utf-8") == expected
