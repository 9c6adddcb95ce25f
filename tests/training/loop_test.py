from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  AdaptiveBalance,
  CheckpointConfig,
  FreezeConfig,
  LossConfig,
  OptimizerConfig,
)
from aquila_jax.core.model_config import GrowthMask, MoeConfig
from aquila_jax.core.moments import get_moments
from aquila_jax.training.interruption import Interrupted
from aquila_jax.training.loop import train
from aquila_jax.training.metrics import read_rows
from aquila_jax.training.state import InitialModel

pytestmark = pytest.mark.usefixtures("steps_built_once")

# Of a row, what is measured with a clock.
_TIMES = {"wall_s", "tokens_per_s", "mfu", "data_wait_share"}


class _Crash(Exception):
  pass


def _meddled(job, meddle):
  """The job with `meddle(step, batch)` called on the batch of every step."""
  batches = job.input.batches

  def meddled(state):
    step = state.rows // job.train.batch_size
    for batch, after in batches(state):
      step += 1
      yield meddle(step, batch), after

  return dataclasses.replace(
    job, input=dataclasses.replace(job.input, batches=meddled)
  )


def _crash_at(at):
  def meddle(step, batch):
    if step == at:
      raise _Crash
    return batch

  return meddle


def _signal_at(at, number=signal.SIGTERM):
  def meddle(step, batch):
    if step == at:
      os.kill(os.getpid(), number)
    return batch

  return meddle


def _rows(job, name="metrics.jsonl"):
  return [
    {k: v for k, v in row.items() if k not in _TIMES}
    for row in read_rows(job.workdir / name)
  ]


def _steps_saved(job):
  return sorted(int(p.name) for p in (job.workdir / "checkpoints").iterdir())


def _last_row(result) -> dict[str, Any]:
  return result.last_row


def _assert_same_bits(a, b):
  def same(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    assert x.tobytes() == y.tobytes()

  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(same, a, b)


def _evaluate(params, step):
  """A deterministic stand-in: best at step 2, and a function of `params`."""
  del params
  return {"loss": abs(step - 2) + 1.0, "loss_en": float(step)}


@pytest.fixture(scope="module")
def every_option(tiny):
  """A config in which all that could break a resumption is on."""
  return tiny.config(
    steps=7,
    num_microbatches=2,
    log_every=3,
    evaluate_every=2,
    optimizer=OptimizerConfig(
      learning_rate=0.01, warmup_steps=2, ema_decay=0.9
    ),
    loss=LossConfig(balance_over="running", adaptive_balance=AdaptiveBalance()),
    checkpoint=CheckpointConfig(
      every_steps=4, every_seconds=0.0, keep_last=1, keep_best=1
    ),
  )


@pytest.fixture(scope="module")
def mixture(tiny):
  """Noise in the routers, and a bias that is no optimizer's."""
  model = tiny.moe()
  moe = dataclasses.replace(
    model.moe, input_jitter=0.01, logit_noise=0.1, selection_bias=True
  )
  return dataclasses.replace(model, moe=moe)


@pytest.fixture(scope="module")
def unbroken(tiny, mixture, every_option, tmp_path_factory):
  job = tiny.job(
    tmp_path_factory.mktemp("unbroken"),
    model=mixture,
    config=every_option,
    evaluate=_evaluate,
  )
  return job, train(job)


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize(
  "meddles, error",
  [
    ([_crash_at(6)], _Crash),  # resumes at 4, in the middle of a row's window
    ([_crash_at(2), _crash_at(4), _crash_at(7)], _Crash),
    ([_signal_at(5), _signal_at(6)], Interrupted),
    ([_signal_at(6)], Interrupted),  # a step that is due for validation
    ([_signal_at(1, signal.SIGINT)], Interrupted),
  ],
)
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(
  tiny, mixture, every_option, unbroken, tmp_path, meddles, error
):
  job = tiny.job(
    tmp_path, model=mixture, config=every_option, evaluate=_evaluate
  )
  for meddle in meddles:
    with pytest.raises(error):
      train(_meddled(job, meddle))
  result = train(job)
  whole_job, whole = unbroken
  _assert_same_bits(result.state, whole.state)
  assert result.data_state == whole.data_state
  assert (result.steps, result.tokens) == (7, 7 * 8 * 16)
  assert result.flops == whole.flops == 7 * 8 * 16 * 100.0
  assert _rows(job) == _rows(whole_job)
  assert [row["step"] for row in _rows(job)] == [3, 6, 7]
  validations = _rows(job, "validation.jsonl")
  assert validations == _rows(whole_job, "validation.jsonl")
  assert [row["step"] for row in validations] == [2, 4, 6, 7]


def test_a_growth_mask_rises_and_goes_on_where_it_was_stopped(tiny, tmp_path):
  mask = GrowthMask(
    embed_dim=12,
    mlp_dim=20,
    num_kv_heads=1,
    queries_per_kv=1,
    new_layers=(0,),
  )
  model = tiny.model(growth_mask=mask)
  config = tiny.config(
    steps=4,
    mask_steps=3,
    num_microbatches=2,
    log_every=1,
    checkpoint=CheckpointConfig(every_steps=2, every_seconds=0.0),
  )
  whole_job = tiny.job(tmp_path / "a", model=model, config=config)
  job = dataclasses.replace(whole_job, workdir=epath.Path(tmp_path / "b"))
  whole = train(whole_job)
  with pytest.raises(_Crash):
    train(_meddled(job, _crash_at(4)))
  _assert_same_bits(train(job).state, whole.state)
  rows = _rows(job)
  assert rows == _rows(whole_job)
  # The update under which the loss of a row was taken began at step - 1.
  np.testing.assert_allclose(
    [row["growth_mask"] for row in rows], [0, 1 / 3, 2 / 3, 1], rtol=1e-6
  )
  # And what is new learns.
  table = np.asarray(whole.state.params["embedding"]["table"])
  start = np.asarray(tiny.params(model)["embedding"]["table"])
  assert np.max(np.abs(table - start)[:, 12:]) > 1e-3


def test_the_best_and_the_last_are_saved(unbroken):
  job, result = unbroken
  # The validation at 2 was the best so far, so it was saved though 2 is not a
  # multiple of 4; it is kept, and so is the last.
  assert _steps_saved(job) == [2, 7]
  assert result.validation_losses == {2: 1.0, 7: 6.0}


def test_a_row_has_every_number(unbroken):
  job, result = unbroken
  row = read_rows(job.workdir / "metrics.jsonl")[-1]
  assert result.last_row == row
  assert set(row) == {
    "step",
    "loss",
    "total_loss",
    "loss_en",
    "loss_zh",
    "balance_loss",
    "router_z_loss",
    "lm_z_loss",
    "lm_max_z_loss",
    "gradient_norm",
    "parameter_norm",
    "update_norm",
    "learning_rate",
    "expert_load",
    "expert_load_by_language",
    "load_entropy",
    "load_max_over_mean",
    "dropped_share",
    "router_entropy",
    "top_gate",
    "balance_weight",
    "tokens",
    "flops",
    "wall_s",
    "tokens_per_s",
    "mfu",
    "data_wait_share",
    "epochs",
  }
  assert np.shape(row["expert_load"]) == (2, 4)
  by_language = row["expert_load_by_language"]
  assert set(by_language) == {"en", "zh"}
  for loads in by_language.values():
    np.testing.assert_allclose(np.sum(loads, axis=-1), [1, 1], rtol=1e-5)
  assert row["epochs"] == {"en": 0.56}
  assert row["tokens"] == 7 * 8 * 16
  assert 0 <= row["data_wait_share"] <= 1 and row["mfu"] > 0
  assert result.wall_s >= row["wall_s"] > 0


def test_a_finished_run_only_reads_its_result(tiny, unbroken):
  job, result = unbroken

  def never(*_):
    raise AssertionError("it started again")

  again = train(
    dataclasses.replace(
      job,
      initial=never,
      evaluate=never,
      input=dataclasses.replace(job.input, batches=lambda state: iter(())),
    )
  )
  _assert_same_bits(again.state, result.state)
  assert again.data_state == result.data_state
  assert again.last_row == result.last_row
  assert again.wall_s >= _last_row(result)["wall_s"]


def test_seconds_are_carried_through_a_stop(tiny, tmp_path):
  job = tiny.job(tmp_path)
  begun = time.perf_counter()
  with pytest.raises(Interrupted):
    train(_meddled(job, _signal_at(4)))
  first = read_rows(job.workdir / "metrics.jsonl")[-1]
  assert first["step"] == 4
  progress = json.loads(
    (job.workdir / "checkpoints/4/progress/metadata").read_text()
  )
  # All of this start up to its checkpoint, and of the next.
  before = progress["spent_s"]
  assert before["compile"] > 0 and before["data_wait"] > 0
  saved = time.perf_counter() - begun
  assert first["wall_s"] < sum(before.values()) < saved
  again = time.perf_counter()
  spent = train(job).spent_s
  assert all(spent[part] >= before[part] for part in before)
  assert spent["restore"] > before["restore"]
  now = sum(spent.values()) - sum(before.values())
  # What is left is the closing of files.
  assert 0 <= time.perf_counter() - again - now < 2
  seconds = [r["wall_s"] for r in read_rows(job.workdir / "metrics.jsonl")]
  assert len(seconds) == 3 and seconds == sorted(seconds)


def test_a_signal_saves_the_step_and_names_it(tiny, tmp_path):
  job = tiny.job(tmp_path)
  with pytest.raises(Interrupted) as error:
    train(_meddled(job, _signal_at(3, signal.SIGINT)))
  assert (error.value.step, error.value.exit_code) == (3, 130)
  assert _steps_saved(job) == [3]


def test_a_second_ctrl_c_stops_at_once(tiny, tmp_path):
  def twice(step, batch):
    if step == 2:
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)
    return batch

  job = tiny.job(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    train(_meddled(job, twice))
  assert _steps_saved(job) == []


def _poison_from(first):
  def meddle(step, batch):
    if step < first:
      return batch
    return batch.replace(weights=np.full_like(batch.weights, np.nan))

  return meddle


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tiny, tmp_path):
  config = tiny.config(
    log_every=5,
    checkpoint=CheckpointConfig(every_steps=2, every_seconds=0.0),
  )
  job = tiny.job(tmp_path, config=config)
  with pytest.raises(errors.TrainingStopped) as error:
    train(_meddled(job, _poison_from(3)))
  assert str(error.value) == (
    "tiny: loss, gradients or parameters are not finite at steps 3, 4; the"
    f" last good checkpoint is of step 2, in {job.workdir}/checkpoints"
  )
  assert _steps_saved(job) == [2]
  assert _rows(job) == []
  # The same text read again without the poison goes on from there.
  assert train(job).steps == 6


def test_a_loss_that_is_not_finite_from_the_start(tiny, tmp_path):
  job = tiny.job(tmp_path)
  with pytest.raises(errors.TrainingStopped) as error:
    train(_meddled(job, _poison_from(1)))
  assert str(error.value) == (
    "tiny: loss, gradients or parameters are not finite at steps 1, 2; nothing"
    " was saved before"
  )
  assert _steps_saved(job) == []


def test_a_validation_that_is_not_finite_stops(tiny, tmp_path):
  config = tiny.config(evaluate_every=3)
  job = tiny.job(
    tmp_path, config=config, evaluate=lambda params, step: {"loss": np.inf}
  )
  with pytest.raises(errors.TrainingStopped) as error:
    train(job)
  assert str(error.value) == (
    "tiny: the validation loss is not finite at step 3; nothing was saved"
    " before"
  )


def test_the_loop_never_compiles(tiny, tmp_path):
  compiled = []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  counts = {}

  def evaluate(params, step):
    del params
    counts[step] = sum("backend_compile" in event for event in compiled)
    return {"loss": 1.0}

  config = tiny.config(
    steps=5,
    evaluate_every=1,
    log_every=1,
    checkpoint=CheckpointConfig(every_steps=1, every_seconds=0.0),
  )
  train(tiny.job(tmp_path, config=config, evaluate=evaluate))
  assert set(counts) == {1, 2, 3, 4, 5}
  # The first step may still compile helpers of saving; the rest nothing.
  assert counts[1] > 0
  assert counts[5] == counts[2]


@pytest.mark.parametrize("log_every, steps", [(1, [1, 2, 3]), (2, [2, 3])])
def test_rows_stand_at_logging_steps_and_the_last(
  tiny, tmp_path, log_every, steps
):
  job = tiny.job(tmp_path, config=tiny.config(steps=3, log_every=log_every))
  train(job)
  assert [row["step"] for row in _rows(job)] == steps


@pytest.mark.parametrize(
  "every_steps, every_seconds, keep_last, saved",
  [
    (100, 0.0, 9, [6]),
    (2, 0.0, 9, [2, 4, 6]),
    (2, 0.0, 2, [4, 6]),
    (100, 1e-9, 9, [1, 2, 3, 4, 5, 6]),
  ],
)
def test_when_it_saves(
  tiny, tmp_path, every_steps, every_seconds, keep_last, saved
):
  checkpoint = CheckpointConfig(
    every_steps=every_steps, every_seconds=every_seconds, keep_last=keep_last
  )
  job = tiny.job(tmp_path, config=tiny.config(checkpoint=checkpoint))
  train(job)
  assert _steps_saved(job) == saved


@pytest.mark.parametrize("keep_best, saved", [(0, [6]), (2, [1, 2, 6])])
def test_only_what_may_be_among_the_best_is_saved(
  tiny, tmp_path, keep_best, saved
):
  checkpoint = CheckpointConfig(
    every_steps=100, every_seconds=0.0, keep_last=1, keep_best=keep_best
  )
  config = tiny.config(evaluate_every=1, checkpoint=checkpoint)
  job = tiny.job(tmp_path, config=config, evaluate=_evaluate)
  train(job)
  assert _steps_saved(job) == saved


def test_the_initial_arrays_are_left_alone(tiny, tmp_path):
  model = tiny.model()
  params = tiny.params(model)
  before = jax.tree.map(np.array, params)
  result = train(
    tiny.job(tmp_path, model=model, initial=lambda: InitialModel(params=params))
  )
  _assert_same_bits(jax.tree.map(np.asarray, params), before)
  assert not np.array_equal(
    result.state.params["lm_head"]["kernel"], before["lm_head"]["kernel"]
  )


def test_a_run_goes_on_with_another_number_of_devices(tiny, tmp_path):
  with pytest.raises(Interrupted):
    train(_meddled(tiny.job(tmp_path / "a"), _signal_at(3)))
  two = train(tiny.job(tmp_path / "a", devices=2))
  one = train(tiny.job(tmp_path / "b"))
  # Sums over the batch in another order, through three updates of 0.01, each
  # of which is a sign where the gradient is close to zero.
  np.testing.assert_allclose(
    _last_row(two)["loss"], _last_row(one)["loss"], rtol=1e-3
  )


def test_another_config_is_refused(tiny, tmp_path):
  train(tiny.job(tmp_path, identity={"data": "digest1"}))
  with pytest.raises(errors.UserError) as error:
    train(
      tiny.job(
        tmp_path,
        config=tiny.config(log_every=1),
        identity={"data": "digest2"},
        total_steps=7,
      )
    )
  assert str(error.value) == (
    f"{tmp_path}/checkpoints/6 was made with another config; use another"
    " workdir, or change back: config.stages.tiny.data: 'digest1' ->"
    " 'digest2'; config.stages.tiny.total_steps: 6 -> 7"
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"freeze": FreezeConfig(axes=("mpl",))},
      "config.stages.tiny.train.freeze.axes[0]='mpl' is unknown; did you mean"
      " 'mlp'?",
    ),
    (
      {"freeze": FreezeConfig(new_only=True)},
      "config.stages.tiny.train.freeze.new_only=True: expected a model that"
      " was grown; its lineage has no scale_up",
    ),
    (
      {"optimizer": OptimizerConfig(learning_rate=1.0, warmup_steps=9)},
      "config.stages.tiny.train.optimizer.warmup_steps=9: expected at most the"
      " steps of the stage, 6",
    ),
    (
      {
        "optimizer": OptimizerConfig(
          learning_rate=1.0, growth_lr="function_space"
        )
      },
      "config.stages.tiny.train.optimizer.growth_lr='function_space': expected"
      " a model that was grown by copying; its lineage has no scale_up, or the"
      " last one has no copies (method='random', or an earlier version of this"
      " package)",
    ),
    (
      {"mask_steps": 9},
      "config.stages.tiny.train.mask_steps=9: expected 0; the model that the"
      " stage starts from has no growth_mask that could rise",
    ),
    (
      {"batch_size": 9},
      "config.stages.tiny.train.batch_size=9: expected a multiple of 2, 1"
      " microbatches spread over 2 devices; the nearest is 8",
    ),
  ],
)
def test_a_mistake_is_told_before_anything_is_written(
  tiny, tmp_path, fields, message
):
  workdir = tmp_path / "run"
  with pytest.raises(errors.UserError) as error:
    train(tiny.job(workdir, config=tiny.config(**fields), devices=2))
  assert str(error.value) == message
  assert not workdir.exists()


def test_new_indices_reach_the_step(tiny, tmp_path):
  model = tiny.model()
  start = tiny.params(model)
  config = tiny.config(freeze=FreezeConfig(new_only=True))
  result = train(
    tiny.job(
      tmp_path, model=model, config=config, new_indices={"layer": [(1, 2)]}
    )
  )
  same = jax.tree.map(
    lambda a, b: np.asarray(a == b), result.state.params, start
  )
  layers = same.pop("layers")
  assert jax.tree.all(jax.tree.map(np.all, same))
  kernel = layers["mlp"]["up_kernel"]
  assert kernel[0].all() and not kernel[1].any()


def test_profile_steps_are_traced(tiny, tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

  def note(step, batch):
    calls.append(step)
    return batch

  job = tiny.job(tmp_path, profile_steps=(1, 3))
  train(_meddled(job, note))
  # The batch of step s + 1 is read before the step that is counted s from 0.
  assert calls == [1, 2, f"{tmp_path}/profile", 3, "stop", 4, 5, 6]


def test_layers_of_two_kinds_freeze_average_and_come_back(tiny, tmp_path):
  model = tiny.model(
    num_layers=4,
    moe=MoeConfig(num_experts=4, block_size=8, layers="every_second"),
  )
  config = tiny.config(
    steps=2,
    log_every=1,
    freeze=FreezeConfig(layers=(0, 2)),
    optimizer=OptimizerConfig(
      learning_rate=0.01, warmup_steps=1, schedule="constant", ema_decay=0.5
    ),
  )
  seen = []

  def route(params):
    # As many ids as the calls before: every time others.
    seen.append(params)
    return np.full((2, 1, 3, 2), len(seen))

  job = dataclasses.replace(
    tiny.job(tmp_path, model=model, config=config), route=route
  )
  result = train(job)
  # The start, and the one checkpoint, at the end.
  assert len(seen) == 2
  assert read_rows(job.workdir / "routing.jsonl") == [
    {"step": 2, "since_step": 0, "agreement": [None, 0.0, None, 0.0]}
  ]
  adam, ema = get_moments(result.state.opt_state), result.state.ema
  assert ema is not None
  before = tiny.params(model)["layers"]
  # Of rows for the layers 0 and 2, and 1 and 3, the first are frozen.
  for part in ("dense_mlp", "mlp"):
    old = np.asarray(before[part]["up_kernel"])
    for tree in (result.state.params, ema):
      new = np.asarray(tree["layers"][part]["up_kernel"])
      np.testing.assert_array_equal(new[0], old[0])
      assert np.all(np.any(new[1] != old[1], axis=(-2, -1)))
    moved = np.asarray(adam.nu["layers"][part]["up_kernel"]) > 0
    assert not moved[0].any() and moved[1].any()
  assert result.last_row is not None
  loads = result.last_row["expert_load"]
  assert [None if load is None else len(load) for load in loads] == [
    None,
    4,
    None,
    4,
  ]
  again = train(job)  # reads its checkpoint
  _assert_same_bits(again.state, result.state)
