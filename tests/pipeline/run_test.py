"""A whole pipeline: what it leaves, and stopped and started anywhere."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.core.model_dir import load_model, read_header
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import evaluate, reporting, stage
from aquila_jax.training import loop
from aquila_jax.training.metrics import read_rows
from tests.growth.tiny import arrays

pytestmark = pytest.mark.usefixtures("steps_built_once")

STAGES = ("dense", "scale_up", "scale_out", "control")
# Of a row, what is measured with a clock.
_TIMES = {"wall_s", "tokens_per_s", "mfu", "data_wait_share"}


def _model(workdir: pathlib.Path, name: str):
  return load_model(
    workdir / "stages" / name / "model", like=decoder_lm.abstract_params
  )


def _rows(workdir: pathlib.Path, name: str):
  rows = read_rows(epath.Path(workdir) / "stages" / name / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]


def _assert_same(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  """Models, moments and metrics of all stages, bit for bit."""
  for name in STAGES:
    ours, theirs = _model(workdir, name), _model(whole, name)
    for tree in ("params", "moments"):
      a, b = arrays(getattr(ours, tree)), arrays(getattr(theirs, tree))
      assert a.keys() == b.keys()
      for leaf in a:
        assert np.array_equal(a[leaf], b[leaf]), (name, tree, leaf)
    assert _rows(workdir, name) == _rows(whole, name)
    assert ours.lineage == theirs.lineage


def test_every_stage_leaves_its_files(whole):
  for name in STAGES:
    folder = whole.workdir / "stages" / name
    of_mixture = (
      {"routing.jsonl"} if name in ("scale_out", "control") else set()
    )
    assert {path.name for path in folder.iterdir()} == of_mixture | {
      "stage.json",
      "checkpoints",
      "metrics.jsonl",
      "validation.jsonl",
      "tensorboard",
      "result.json",
      "model",
      "evaluation.json",
    }
  assert {path.name for path in whole.workdir.iterdir()} == {
    "config.json",
    "stages",
    "report.html",
    "summary.json",
  }


def test_routing_is_compared_with_the_last_checkpoints(whole):
  folder = epath.Path(whole.workdir) / "stages/scale_out"
  rows = read_rows(folder / "routing.jsonl")
  assert rows[-1]["step"] == 4
  for row in rows:
    assert row["since_step"] < row["step"]
    assert len(row["agreement"]) == 3  # layers
    assert all(0 <= share <= 1 for share in row["agreement"])
  load = read_rows(folder / "metrics.jsonl")[-1]["expert_load_by_language"]
  assert set(load) == {"en", "zh"}


def test_the_lineage_of_the_mixture_is_the_whole_story(whole):
  header = read_header(whole.workdir / "stages/scale_out/model")
  lineage = header.lineage
  assert header.config.moe is not None
  assert [(e.kind, e.name, e.steps) for e in lineage.events] == [
    ("scratch", "dense", 0),
    ("train", "dense", 4),
    ("scale_up", "scale_up", 0),
    ("train", "scale_up", 4),
    ("scale_out", "scale_out", 0),
    ("train", "scale_out", 4),
  ]
  assert lineage.tokens == 3 * 4 * 8 * 32


def test_the_control_starts_from_nothing_with_the_same_flops(whole):
  own, control = (
    read_header(whole.workdir / "stages" / name / "model").lineage
    for name in ("scale_out", "control")
  )
  assert [event.kind for event in control.events] == ["scratch", "train"]
  a_step = control.flops / control.steps
  assert abs(control.flops - own.flops) <= a_step / 2


def test_the_data_go_on_from_stage_to_stage(whole):
  rows = {
    name: [r["epochs"] for r in _rows(whole.workdir, name)] for name in STAGES
  }
  for source in ("en", "zh"):
    way = [
      row[source]
      for name in ("dense", "scale_up", "scale_out")
      for row in rows[name]
    ]
    assert way == sorted(way)
    assert way[-1] > way[3] > 0
  # The control begins at the beginning.
  assert rows["control"][0] == rows["dense"][0]


def test_losses_around_the_transforms(whole):
  def losses(name: str) -> dict[str, float]:
    path = whole.workdir / "stages" / name / "stage.json"
    return json.loads(path.read_text())["transform_losses"]

  last = read_rows(epath.Path(whole.workdir) / "stages/dense/validation.jsonl")[
    -1
  ]
  grown, upcycled = losses("scale_up"), losses("scale_out")
  assert list(grown) == ["source", "fpi", "aki_pro"]
  # The source's is the one that its own training ended on.
  assert grown["source"] == pytest.approx(last["loss"], rel=1e-6)
  # Even copies of all widths; depth 2 -> 3 is not exact, but near.
  assert grown["fpi"] == pytest.approx(grown["source"], rel=1e-2)
  assert grown["aki_pro"] != grown["fpi"]
  # Upcycling is exact, to float32.
  assert upcycled["sparse_upcycling"] == pytest.approx(
    upcycled["source"], rel=1e-6
  )
  assert losses("dense") == losses("control") == {}


def test_the_report_is_of_this_run(whole):
  report = whole.finished.report
  assert [s.name for s in report.stages] == list(STAGES)
  assert [s.name for s in report.lineage] == list(STAGES[:3])
  assert [s.name for s in report.controls] == ["control"]
  for result in report.stages:
    assert result.evaluation is not None
    assert set(result.evaluation.languages) == {"en", "zh"}
    assert [sample.prompt for sample in result.samples] == ["the river"]
  dense, grown = report.stages[:2]
  assert grown.flops_before == dense.flops
  assert grown.wall_before_s == dense.wall_s
  summary = json.loads((whole.workdir / "summary.json").read_text())
  assert [s["name"] for s in summary["stages"]] == list(STAGES)
  page = (whole.workdir / "report.html").read_text(encoding="utf-8")
  assert "AKI-Pro" in page and "Expert load" in page


def test_a_second_run_finds_everything_done(whole, kit):
  before = {
    path: path.stat().st_mtime_ns
    for path in (whole.workdir / "stages").rglob("*")
  }
  messages: list[str] = []
  again = kit.run(whole.workdir, messages)
  assert again.did_nothing
  assert messages == [f"{name}: done" for name in STAGES]
  assert before == {
    path: path.stat().st_mtime_ns
    for path in (whole.workdir / "stages").rglob("*")
  }


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      dict(stages__scale_up__train__optimizer__learning_rate=1e-3),
      "stages/scale_up/stage.json was made with another config; use another"
      " workdir, or change back:"
      " config.stages.scale_up.train.optimizer.learning_rate: 0.003 -> 0.001",
    ),
    (
      dict(stages__scale_out__init__optimizer="reset"),
      "stages/scale_out/stage.json was made with another config; use another"
      " workdir, or change back: config.stages.scale_out.init.optimizer: 'grow'"
      " -> 'reset'",
    ),
  ],
)
def test_another_config_for_a_finished_stage_is_refused(
  whole, kit, changes, message
):
  with pytest.raises(errors.UserError) as caught:
    kit.run(whole.workdir, **changes)
  assert str(caught.value) == f"{whole.workdir}/{message}"


def test_other_data_for_a_finished_stage_are_refused(whole, kit):
  with pytest.raises(errors.UserError) as caught:
    kit.run(whole.workdir, data__prepared=kit.other_prepared)
  assert "stages/dense/stage.json was made with another config" in str(
    caught.value
  )
  assert "config.stages.dense.data: " in str(caught.value)


class _Crash(BaseException):
  """A kill, as far as any handler is concerned."""


def _crashing(monkeypatch, module, name: str, *, call: int, after: bool):
  """The function dies at its `call`-th call, before or after its work."""
  original = getattr(module, name)
  calls = 0

  def wrapped(*args, **kwargs):
    nonlocal calls
    calls += 1
    if calls == call and not after:
      raise _Crash
    result = original(*args, **kwargs)
    if calls == call and after:
      raise _Crash
    return result

  monkeypatch.setattr(module, name, wrapped)


# One start each, in order; calls are counted from that start.
INSTANTS = (
  (stage, "train", 1, False),  # stage.json of dense is there, no step is
  (stage, "train", 1, True),  # dense is trained, its result not written
  (stage, "save_model", 1, False),  # the result is written, the MODEL not
  (evaluate, "generate", 1, False),  # dense is done but for its evaluation
  (stage, "_transform_losses", 1, True),  # scale_up is grown and measured
  (loop, "_validate", 1, True),  # in the middle of scale_up, at step 2
  (stage, "save_model", 2, True),  # scale_out has its MODEL
  (loop, "_save", 2, True),  # a checkpoint of control is on its way
  (reporting, "write_report", 1, False),
)


@pytest.mark.long
def test_killed_at_any_instant_and_started_again(
  kit, whole, tmp_path, monkeypatch
):
  for module, name, call, after in INSTANTS:
    with monkeypatch.context() as patch:
      _crashing(patch, module, name, call=call, after=after)
      try:
        kit.run(tmp_path)
      except _Crash:
        continue
      raise AssertionError(f"{name} was not called {call} times")
  kit.run(tmp_path)
  _assert_same(tmp_path, whole.workdir)
  assert not list(tmp_path.rglob("*.partial"))
