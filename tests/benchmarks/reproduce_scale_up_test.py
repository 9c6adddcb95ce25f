"""The runner of the reproduction in miniature, and the page of its results."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from fractions import Fraction
from typing import Any

import pytest
from etils import epath

from aquila_jax.cli import config_door
from benchmarks.reproduce_scale_up import initial, page, smoke, statistics
from benchmarks.reproduce_scale_up.run import Job, run

CONFIG = "experiments/configs/reproduce_scale_up.py"
# Of one size: one program measures them all.
ROWS = [
  (initial.MAIN, "FPI, LLaMA-Pro's zero blocks"),
  (initial.MAIN, "FPI, interpolation"),
  (initial.MAIN, "AKI-Pro, next_layer"),
]


class _Killed(BaseException):
  """Nobody catches it, as nobody catches a SIGKILL."""


def _job(workdir: pathlib.Path, say) -> Job:
  experiment = smoke.shrunk(config_door.load_file(CONFIG))
  return Job(
    experiment=dataclasses.replace(experiment, pipeline=("source", "fpi")),
    workdir=epath.Path(workdir),
    seeds=(0,),
    output=workdir / "results.json",
    page=workdir / "page.md",
    say=say,
  )


@pytest.mark.long
def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path):
  said: list[str] = []

  def say_until_the_second_row(line: str) -> None:
    said.append(line)
    if line.startswith("initial loss 2/3"):
      raise _Killed

  with pytest.raises(_Killed):
    run(_job(tmp_path, say_until_the_second_row), checks=False, rows=ROWS)
  rows = tmp_path / "seed_0" / "initial.jsonl"
  before = rows.read_text(encoding="utf-8")
  for _ in range(2):  # the second finds everything done
    run(_job(tmp_path, said.append), checks=False, rows=ROWS)

  assert rows.read_text(encoding="utf-8").startswith(before)
  measured = [line for line in said if line.startswith("initial loss")]
  assert [line.split(":")[0] for line in measured] == [
    f"initial loss {i}/3" for i in range(4)
  ]
  wrote = [line for line in said if ": wrote " in line]
  assert [line.split(":")[0] for line in wrote] == ["source", "fpi"]

  results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
  found = results["seeds"]["0"]
  source, zero_blocks, fpi, aki = (row["loss"] for row in found["initial"])
  # Rounding of float32 in a loss of about 6.
  assert zero_blocks == pytest.approx(source, abs=1e-5)
  assert min(abs(fpi - source), abs(aki - fpi)) > 1e-3
  exact = [row["exact"] for row in found["initial"]]
  assert exact == [True, True, False, False]
  # 8 steps of 8 * 32 tokens, validated every 4 and before the first.
  assert [t for t, _ in found["stages"]["fpi"]["curve"]] == [0, 1024, 2048]
  assert found["stages"]["fpi"]["curve"][0][1] == pytest.approx(fpi, abs=1e-5)


def test_sizes_are_whole_and_the_main_one_is_that_of_the_arms():
  stages = config_door.load_file(CONFIG).stages
  source, arm = stages["source"].model, stages["fpi"].model
  assert initial.SIZES[initial.MAIN].of(source) == arm
  widths = [size.of(source).embed_dim for size in initial.SIZES.values()]
  assert widths == [192, 120, 96, 192, 120]


def test_every_method_is_measured_where_it_says_something():
  grid = initial.grid()
  assert len(grid) == len(set(grid)) == 57
  stacked = {size for size, name in grid if name == "FPI, stacking"}
  assert stacked == {s for s, z in initial.SIZES.items() if z.depth > 1}
  cloned = {size for size, name in grid if name == "HyperCloning, noise"}
  assert cloned == {
    s for s, z in initial.SIZES.items() if z.width == Fraction(2)
  }
  assert [size for size, name in grid if name == "LiGO"] == [initial.MAIN]


@pytest.mark.parametrize(
  ("arm", "other", "tokens"),
  [
    ((5, 3, 2), (4, 3.5, 3), 10),
    ((5, 3, 4), (4, 3.5, 3), None),  # below, and above again
    ((5, 4, 2), (4, 4, 3), 20),  # equal is not below
    ((1, 1, 1), (2, 2, 2), 0),
  ],
)
def test_overtaken_where_it_stays_below(arm, other, tokens):
  def curve(losses):
    return [[10 * i, loss] for i, loss in enumerate(losses)]

  assert statistics.overtaken_at(curve(arm), curve(other)) == tokens


def _results(seeds: int) -> dict[str, Any]:
  """Numbers of the paper's shape; seed N lies N above seed 0."""
  rises = {
    ("width x2", "FPI, interpolation"): (0.0, True),
    ("width x1.25", "FPI, interpolation"): (0.1, False),
    ("width x1.25", "random"): (5.0, False),
    (initial.MAIN, "FPI, interpolation"): (0.3, False),
    (initial.MAIN, "FPI, stacking"): (1.5, False),
    (initial.MAIN, "AKI-Pro, next_layer"): (4.0, False),
  }

  def rows(seed: int) -> list[dict[str, Any]]:
    source = dict(
      size="", method="source", loss=3.0 + seed, exact=True, unigram=7.0
    )
    return [source] + [
      dict(size=size, method=method, loss=3.0 + seed + rise, exact=exact)
      for (size, method), (rise, exact) in rises.items()
    ]

  def stage(*losses: float) -> dict[str, Any]:
    curve = [[1000 * i, loss] for i, loss in enumerate(losses)]
    return dict(curve=curve, wall_s=10.0, learning_rate=1e-3)

  size = dict(
    layers=2, width=8, FFN=16, heads=2, groups=1, parameters=12345,
    steps=10, tokens=20000, learning_rate=1e-3,
  )  # fmt: skip
  return dict(
    date="2026-01-02",
    machine=dict(device="a CPU"),
    versions=dict(jax="1.2"),
    arms=["fpi", "aki_pro"],
    ligo_steps=77,
    models=dict(source=size, fpi=size),
    seeds={
      str(seed): dict(
        initial=rows(seed),
        stages=dict(
          source=stage(3.0),
          fpi=stage(3.3, 3.2, 3.1),
          aki_pro=stage(7.0, 3.1, 3.0 + 0.05 * seed),
        ),
      )
      for seed in range(seeds)
    },
  )


def test_page_has_means_spreads_and_what_follows_from_them():
  text = page.render(_results(2), figure_name="page.svg")
  for line in (
    "Done so far: initial losses of 2 seeds, continued training of 2.",
    "| FPI | exact | 2.97 -> 2.97; 1.85 -> 1.85 | 3.500 ± 0.500 |"
    " 0.000 ± 0.000 |",
    "| interpolation lies far below stacking (rise at most half) | yes |"
    " interpolation 0.300, stacking 1.500 |",
    "| AKI-Pro (next_layer) starts below random | not measured |  |",
    "| AKI-Pro, residual of the next layer | 7.000 ± 0.000 | 3.100 ± 0.000 |"
    " 3.025 ± 0.025 |",
    "| AKI-Pro, residual of the next layer: below FPI, interpolation |"
    " 1,000 tokens | 1,000 tokens |",
    "![Validation loss over tokens of six arms](page.svg)",
    "LiGO's operator was trained 77 steps",
  ):
    assert line in text
  assert "{" not in text


def test_page_of_one_seed_shows_no_spread_and_a_broken_shape_says_no():
  results = _results(1)
  (stacking,) = statistics.initial(results, initial.MAIN, "FPI, stacking")
  stacking["loss"] = 3.2
  text = page.render(results, figure_name="")
  assert "(rise at most half) | **no** | interpolation 0.300" in text
  assert "±" not in text


def test_page_is_written_beside_its_figure(tmp_path):
  page.write(_results(2), tmp_path / "docs" / "found.md")
  drawing = (tmp_path / "docs" / "found.svg").read_text(encoding="utf-8")
  # Two arms: in the legend, the mean, and two seeds.
  assert drawing.count('class="line arm') == 2 * (1 + 1 + 2)
  assert drawing.count(' one"') == 2 * 2
  assert "(found.svg)" in (tmp_path / "docs" / "found.md").read_text("utf-8")


def test_committed_page_is_that_of_the_committed_results():
  path = pathlib.Path("benchmarks/results/reproduce_scale_up.json")
  if not path.exists():
    pytest.skip("not run yet")
  results = json.loads(path.read_text(encoding="utf-8"))
  committed = pathlib.Path("docs/reproduce_scale_up.md")
  expected = page.render(results, figure_name="reproduce_scale_up.svg")
  assert committed.read_text(encoding="utf-8") == expected


def test_what_was_looked_into_agrees_with_the_table():
  """The same growths of the same sources, measured by the two scripts."""
  folder = pathlib.Path("benchmarks/results")
  table, looked = (
    json.loads((folder / f"reproduce_scale_up{name}.json").read_text("utf-8"))
    for name in ("", "_layers")
  )
  assert set(looked["seeds"]) == set(table["seeds"])
  for seed, found in table["seeds"].items():
    rows = {
      (row["size"], row["method"]): row["loss"] for row in found["initial"]
    }
    source = rows["", "source"]
    for name, method in (
      ("interpolation: 0 and 3", "FPI, interpolation"),
      ("stacking: 0 and 1 on top", "FPI, stacking"),
    ):
      rise = rows["depth x4/3", method] - source
      assert abs(looked["seeds"][seed][name] - rise) < 1e-4, (seed, name)
