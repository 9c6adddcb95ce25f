"""One stage by itself: from a MODEL, with parts frozen, without moments."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import Load
from aquila_jax.core.model_dir import load_model, read_header
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.context import Context
from aquila_jax.pipeline.initial import Start
from aquila_jax.pipeline.stage import run_stage
from aquila_jax.training.metrics import read_rows
from aquila_jax.training.recorder import Recorder
from tests.growth.tiny import arrays


def _start(context: Context, name: str, source: str) -> Start:
  """A stage that loads a MODEL."""
  stage = dataclasses.replace(
    context.experiment.stages[name], init=Load(path=source)
  )
  return Start(context=context, name=name, stage=stage, locate=str)


def _load(path: pathlib.Path):
  return load_model(path, like=decoder_lm.abstract_params)


def test_a_model_is_gone_on_with_where_its_training_ended(kit, whole, tmp_path):
  source = whole.workdir / "stages/dense/model"
  messages: list[str] = []
  context = kit.context(tmp_path / "data", messages)
  folder = epath.Path(tmp_path / "run")
  run_stage(_start(context, "dense", str(source)), folder)
  before, after = _load(source), _load(tmp_path / "run/model")
  assert before.moments is not None and after.moments is not None
  assert int(before.moments.count) == 4
  assert int(after.moments.count) == 8
  assert "dense: the optimizer state goes on from step 4" in messages, messages
  kinds = [event.kind for event in after.lineage.events]
  assert kinds == ["scratch", "train", "train"]
  assert before.lineage.data_state is not None
  assert after.lineage.data_state is not None
  assert before.lineage.data_state["rows"] == 4 * 8
  assert after.lineage.data_state["rows"] == 8 * 8


def _learning_rates(folder: epath.Path) -> list[float]:
  return [row["learning_rate"] for row in read_rows(folder / "metrics.jsonl")]


def test_restart_starts_a_trained_model_at_the_peak(kit, whole, tmp_path):
  source = whole.workdir / "stages/dense/model"
  messages: list[str] = []
  context = kit.context(
    tmp_path / "data",
    messages,
    stages__dense__train__optimizer__continuation="restart",
    stages__dense__train__evaluate_every=0,
  )
  folder = epath.Path(tmp_path / "run")
  run_stage(_start(context, "dense", str(source)), folder)
  # A step of warm-up is in the config; 0.1 + 0.9 (1 + cos(pi s / 4)) / 2.
  np.testing.assert_allclose(
    _learning_rates(folder),
    3e-3 * np.array([0.868198, 0.55, 0.231802, 0.1]),
    rtol=1e-5,
  )
  said = "dense: the learning rate starts at its peak, without warm-up"
  assert said in messages, messages


@pytest.mark.long
def test_a_grown_stage_trains_in_function_space_and_goes_on_bit_for_bit(
  kit, whole, tmp_path, monkeypatch
):
  messages: list[str] = []
  context = kit.context(
    tmp_path / "data",
    messages,
    stages__scale_up__train__optimizer__growth_lr="function_space",
    stages__scale_up__train__optimizer__continuation="keep",
    stages__scale_up__init__compare=(),
    stages__scale_up__train__evaluate_every=0,
  )

  def start() -> Start:
    return Start(
      context=context,
      name="scale_up",
      stage=context.experiment.stages["scale_up"],
      locate=lambda name: str(whole.workdir / "stages" / name / "model"),
    )

  run_stage(start(), epath.Path(tmp_path / "whole"))
  broken = epath.Path(tmp_path / "broken")
  with monkeypatch.context() as patch:
    patch.setattr(Recorder, "add", _crash_at(3, Recorder.add))
    with pytest.raises(_Crash):
      run_stage(start(), broken)
  run_stage(start(), broken)
  ours, theirs = (
    arrays(_load(tmp_path / name / "model").params)
    for name in ("broken", "whole")
  )
  for name, leaf in ours.items():
    assert np.array_equal(leaf, theirs[name]), name
  # 0.1 + 0.9 (1 + cos(pi (s - 1) / 7)) / 2 at s = 5..8, of 4 steps and 4.
  np.testing.assert_allclose(
    _learning_rates(broken),
    3e-3 * np.array([0.449866, 0.269430, 0.144564, 0.1]),
    rtol=1e-5,
  )
  said = "scale_up: the learning rate goes on from step 4 of 8"
  assert said in messages, messages
  # D 16 -> 32, F stays, G 2 -> 4; carried on to what is grown from it.
  copies = _load(tmp_path / "broken/model").lineage.copies
  assert copies is not None
  assert {name: set(c) for name, c in copies.items()} == {
    "embed": {2},
    "mlp": {1},
    "kv_head": {1},
    "q_per_kv": {2},
  }


class _Crash(Exception):
  pass


def _crash_at(at: int, method):
  def crash(recorder, step, metrics):
    if step == at:
      raise _Crash
    method(recorder, step, metrics)

  return crash


def test_other_data_are_read_from_their_beginning(kit, whole, tmp_path):
  source = whole.workdir / "stages/dense/model"
  messages: list[str] = []
  # Another seed is another order of the same text.
  context = kit.context(tmp_path / "data", messages, data__seed=1)
  run_stage(_start(context, "dense", str(source)), epath.Path(tmp_path / "run"))
  assert (
    "dense: the model was trained on other data; these are read from their"
    " beginning"
  ) in messages
  state = _load(tmp_path / "run/model").lineage.data_state
  assert state is not None
  assert (state["rows"], state["seed"]) == (4 * 8, 1)


def test_the_optimizer_state_can_be_left_out(kit, tmp_path):
  context = kit.context(tmp_path / "data")
  start = Start(
    context=context,
    name="dense",
    stage=context.experiment.stages["dense"],
    locate=str,
  )
  run_stage(start, epath.Path(tmp_path / "run"), save_optimizer=False)
  assert _load(tmp_path / "run/model").moments is None
  assert not (tmp_path / "run/model/optimizer").exists()


def test_another_architecture_is_refused(kit, whole, tmp_path):
  source = whole.workdir / "stages/scale_up/model"
  context = kit.context(tmp_path / "data")
  with pytest.raises(errors.UserError) as caught:
    run_stage(
      _start(context, "dense", str(source)), epath.Path(tmp_path / "run")
    )
  assert str(caught.value) == (
    "config.stages.dense.model.num_layers=2: the MODEL has 3; a stage that"
    " loads a MODEL takes it as it is"
  )
  assert not (tmp_path / "run").exists()


def test_a_model_of_another_tokenizer_is_refused(kit, whole, tmp_path):
  source = str(whole.workdir / "stages/dense/model")
  context = kit.context(tmp_path / "data", data__prepared=kit.other_prepared)
  with pytest.raises(errors.UserError) as caught:
    run_stage(_start(context, "dense", source), epath.Path(tmp_path / "run"))
  assert str(caught.value) == (
    f"config.stages.dense.init.path={source!r}: its tokenizer is not the"
    f" data's; give config.data.tokenizer.path='{source}/tokenizer.json' and"
    " prepare the data with it"
  )


def test_new_only_trains_what_scale_up_added_and_nothing_else(
  kit, whole, tmp_path
):
  changes = dict(
    stages__scale_up__train__freeze__new_only=True,
    stages__scale_up__init__compare=(),
    # Decoupled decay would be masked too, but shows in the moments' place.
    stages__scale_up__train__evaluate_every=0,
  )
  context = kit.context(tmp_path / "data", **changes)

  def locate(source: str) -> str:
    return str(whole.workdir / "stages" / source / "model")

  start = Start(
    context=context,
    name="scale_up",
    stage=context.experiment.stages["scale_up"],
    locate=locate,
  )
  run_stage(start, epath.Path(tmp_path / "run"))
  before = arrays(start.model().params)
  after = arrays(_load(tmp_path / "run/model").params)
  changed = {name: before[name] != after[name] for name in before}
  # D 16 -> 32 (new from 16 on), layers 0 0 1 (layer 1 is new), G 2 -> 4.
  table = changed["embedding/table"]
  assert not table[:, :16].any() and table[:, 16:].any()
  gate = changed["layers/mlp/gate_kernel"]  # [L, D, F]
  assert not gate[[0, 2], :16].any()
  assert gate[1].all(axis=1).any() and gate[[0, 2], 16:].any()
  query = changed["layers/attention/query_kernel"]  # [L, D, K, G, H]
  assert not query[[0, 2], :16, :, :2].any()
  assert query[0, :16, :, 2:].any()


def _masked(source: pathlib.Path, target: pathlib.Path) -> str:
  """A copy of a MODEL whose last dimensions and layer are new."""
  shutil.copytree(source, target)
  file = target / "config.json"
  header = json.loads(file.read_text())
  header["model"]["growth_mask"] = dict(
    embed_dim=12,
    mlp_dim=20,
    num_kv_heads=1,
    queries_per_kv=1,
    new_layers=[1],
  )
  file.write_text(json.dumps(header))
  return str(target)


def test_the_mask_of_a_model_rises_in_a_stage_and_stays_with_its_model(
  kit, whole, tmp_path
):
  source = _masked(whole.workdir / "stages/dense/model", tmp_path / "masked")
  changes: dict[str, Any] = dict(
    stages__dense__train__mask_steps=8, stages__dense__train__evaluate_every=4
  )
  messages: list[str] = []
  context = kit.context(tmp_path / "data", messages, **changes)
  start = _start(context, "dense", source)
  first = epath.Path(tmp_path / "one")
  run_stage(start, first)
  assert "dense: the growth mask rises from 0 to 0.5" in messages
  half = _load(tmp_path / "one/model")
  mask = half.config.growth_mask
  assert mask is not None
  assert (mask.value, mask.embed_dim, mask.new_layers) == (0.5, 12, (1,))
  shown = [row["growth_mask"] for row in read_rows(first / "metrics.jsonl")]
  assert shown == [0.0, 0.125, 0.25, 0.375]
  # The last validation saw what the MODEL computes, not what it had begun as.
  evaluator = context.evaluator(
    half.config, split="validation", sequence_length=32, max_tokens=256
  )
  (row,) = read_rows(first / "validation.jsonl")
  assert row["loss"] == evaluator(half.params)["loss"]
  assert row["loss"] != evaluator(half.params, mask_value=0.0)["loss"]

  # A stage that is started again knows the mask that it began with.
  shutil.rmtree(first / "model")
  run_stage(start, first)
  assert read_header(first / "model").config == half.config
  # And one that loads the MODEL goes on from where that mask stands.
  following = _start(context, "dense", str(first / "model"))
  assert following.model().config == half.config


def test_a_mask_without_steps_is_refused_before_anything_is_written(
  kit, whole, tmp_path
):
  source = _masked(whole.workdir / "stages/dense/model", tmp_path / "masked")
  context = kit.context(tmp_path / "data")
  with pytest.raises(errors.UserError) as caught:
    run_stage(_start(context, "dense", source), epath.Path(tmp_path / "run"))
  assert str(caught.value) == (
    "config.stages.dense.train.mask_steps=0: expected at least 1; the model"
    " that the stage starts from has a growth_mask of value 0, which training"
    " raises to 1, by 1 in so many steps"
  )
  assert not (tmp_path / "run").exists()


def test_what_is_measured_of_a_start_does_not_depend_on_the_order(kit, whole):
  """Two starts of a stage make the same weights; two stages do not."""
  context = kit.context(whole.workdir)

  def table(name: str) -> np.ndarray:
    start = Start(
      context=context,
      name=name,
      stage=context.experiment.stages["dense"],
      locate=str,
    )
    return np.asarray(start.model().params["embedding"]["table"])

  assert np.array_equal(table("dense"), table("dense"))
  assert not np.array_equal(table("dense"), table("other"))
