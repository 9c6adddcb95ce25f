"""Steps out of hand are found, skipped, or gone back from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import CheckpointConfig, SpikeConfig
from aquila_jax.core.moments import get_moments
from aquila_jax.data.loader import DataState
from aquila_jax.training import program as program_lib
from aquila_jax.training import spikes
from aquila_jax.training import state as state_lib
from aquila_jax.training.loop import train
from aquila_jax.training.metrics import read_rows

pytestmark = pytest.mark.usefixtures("steps_built_once")


def _judge(recent, loss, norm, *, finite=True, **fields):
  defaults: dict[str, Any] = dict(spike="skip", window=8, sigmas=3.0)
  config = SpikeConfig(**(defaults | fields))
  return spikes.judge(
    jnp.asarray(recent, jnp.float32),
    loss=jnp.float32(loss),
    gradient_norm=jnp.float32(norm),
    finite=jnp.asarray(finite),
    config=config,
  )


def _recent(count: int, window: int = 8) -> np.ndarray:
  rng = np.random.default_rng(3)
  found = np.full((2, window), np.nan)
  found[:, window - count :] = rng.normal([[4.0], [1.0]], 0.1, (2, count))
  return found


@pytest.mark.parametrize("count", [4, 5, 8])
@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_far_above_the_mean_of_the_last_steps(count, which):
  recent = _recent(count)
  known = recent[:, 8 - count :]
  limits = known.mean(1) + 3 * known.std(1, ddof=1)
  for beyond in (-1e-3, 1e-3):
    numbers = known.mean(1)
    numbers[which] = limits[which] + beyond
    found = _judge(recent, *numbers)
    assert bool(found.spike) == (beyond > 0)
    assert bool(found.skip) == (beyond > 0)
    assert found.recent is not None
    # A spike is among the recent ones from then on: a new level is not one.
    np.testing.assert_allclose(found.recent[:, -1], numbers, rtol=1e-6)
    np.testing.assert_array_equal(
      found.recent[:, :-1], recent[:, 1:].astype(np.float32)
    )


def test_few_steps_say_nothing_and_low_numbers_are_no_spike():
  assert not _judge(_recent(3), 100.0, 100.0).spike
  assert not _judge(_recent(8), -100.0, 0.0).spike
  assert not _judge(_recent(8), 100.0, 100.0, spike="rewind").skip


@pytest.mark.parametrize("nonfinite", ["stop", "skip", "rewind"])
def test_what_is_not_finite_is_no_spike_and_is_forgotten(nonfinite):
  recent = _recent(8)
  found = _judge(recent, np.nan, np.inf, finite=False, nonfinite=nonfinite)
  assert not found.spike
  assert bool(found.skip) == (nonfinite == "skip")
  np.testing.assert_array_equal(found.recent, recent.astype(np.float32))


def _meddled(job, *steps: int, how):
  """The job with the batches of those steps, by their place in the data."""
  inner = job.input.batches

  def batches(state):
    step = state.rows // job.train.batch_size
    for batch, after in inner(state):
      step += 1
      yield how(batch) if step in steps else batch, after

  return dataclasses.replace(
    job, input=dataclasses.replace(job.input, batches=batches)
  )


def _poisoned(batch):
  return batch.replace(weights=np.full_like(batch.weights, np.nan))


def _strange(batch):
  """Tokens that no other batch has."""
  return batch.replace(targets=batch.targets + 32)


def _config(tiny, **fields):
  policy = {
    name: fields.pop(name)
    for name in (
      "nonfinite",
      "spike",
      "window",
      "sigmas",
      "rewind_margin",
      "most_in_a_row",
    )
    if name in fields
  }
  defaults = dict(
    steps=8,
    log_every=4,
    checkpoint=CheckpointConfig(every_steps=2, every_seconds=0.0, keep_last=9),
  )
  return tiny.config(spikes=SpikeConfig(**policy), **(defaults | fields))


def _stepped(job, numbers: list[int | None]):
  """The state after steps on those batches; None is a step that does nothing.

  The oracle: the same program called by hand, on what it does not skip.
  """
  program = program_lib.make_program(
    job.model,
    job.train,
    mesh=job.mesh,
    total_steps=job.total_steps,
    num_languages=2,
  )
  state = state_lib.place_initial(
    job.initial(),
    optimizer=program.optimizer,
    like=program.state,
    recent=spikes.no_steps(job.train.spikes),
  )
  for number in numbers:
    if number is None:
      state = state.replace(step=state.step + 1)
      continue
    rows = (number - 1) * job.train.batch_size
    batch, _ = next(job.input.batches(DataState(rows=rows, tokens={})))
    state, _ = program.jitted(state, batch)
  return state


def _assert_same(found, expected):
  """Bit for bit, but for what is known of recent steps."""
  parts = [
    (x.step, x.params, get_moments(x.opt_state)) for x in (found, expected)
  ]
  jax.tree.map(np.testing.assert_array_equal, *parts)


def _spikes(job) -> list[tuple[int, str]]:
  rows = read_rows(job.workdir / "spikes.jsonl")
  return [(row["step"], row["then"]) for row in rows]


def test_a_step_that_is_not_finite_is_skipped(tiny, tmp_path):
  config = _config(tiny, nonfinite="skip")
  job = tiny.job(tmp_path, config=config)
  result = train(_meddled(job, 3, 6, how=_poisoned))
  _assert_same(result.state, _stepped(job, [1, 2, None, 4, 5, None, 7, 8]))
  assert _spikes(job) == [(3, "skipped"), (6, "skipped")]
  # The rows are means over the others.
  for row in read_rows(job.workdir / "metrics.jsonl"):
    assert np.isfinite(row["loss"])


def test_steps_skipped_in_a_row_end_the_run(tiny, tmp_path):
  config = _config(tiny, nonfinite="skip", most_in_a_row=3)
  job = tiny.job(tmp_path, config=config)
  with pytest.raises(errors.TrainingStopped) as error:
    train(_meddled(job, 1, 2, 4, 5, 6, how=_poisoned))
  assert str(error.value) == (
    "tiny: 3 steps in a row were skipped, the last of them 6; the last good"
    f" checkpoint is of step 4, in {job.workdir}/checkpoints"
  )


def test_a_spike_is_skipped_also_after_a_stop(tiny, tmp_path):
  config = _config(tiny, spike="skip", window=8, sigmas=6.0, steps=14)
  job = tiny.job(tmp_path / "one", config=config)
  meddled = functools.partial(_meddled, how=_strange)
  result = train(meddled(job, 12))
  expected = [None if step == 12 else step for step in range(1, 15)]
  _assert_same(result.state, _stepped(job, expected))
  assert _spikes(job) == [(12, "skipped")]

  other = tiny.job(tmp_path / "two", config=config)

  def crash(batch):
    del batch
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train(_meddled(meddled(other, 12), 11, how=crash))
  again = train(meddled(other, 12))
  jax.tree.map(np.testing.assert_array_equal, again.state, result.state)


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("margin", [1, 2])
def test_going_back_passes_the_batch_and_all_since_the_checkpoint(
  tiny, tmp_path, margin
):
  config = _config(tiny, nonfinite="rewind", rewind_margin=margin)
  job = tiny.job(tmp_path / "one", config=config)
  poisoned = _meddled(job, 3, how=_poisoned)
  result = train(poisoned)
  # Before step 3 stand the checkpoints of steps 0 and 2.
  step = {1: 2, 2: 0}[margin]
  batches = [*range(1, step + 1), *range(4, 4 + 8 - step)]
  _assert_same(result.state, _stepped(job, list(batches)))
  assert _spikes(job) == [(3, f"back to step {step}")]
  assert result.data_state.rows == (3 + 8 - step) * config.batch_size
  rows = read_rows(job.workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == [4, 8]
  assert all(np.isfinite(row["loss"]) for row in rows)

  # Killed on the way, before or after it went back, it comes to the same.
  for place in (4, 5, 7):
    other = tiny.job(tmp_path / f"at {place}", config=config)
    other = _meddled(other, 3, how=_poisoned)

    def crash(batch):
      del batch
      raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
      train(_meddled(other, place, how=crash))
    again = train(other)
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)


def test_a_spike_is_gone_back_from(tiny, tmp_path):
  config = _config(tiny, spike="rewind", window=8, sigmas=6.0, steps=14)
  job = tiny.job(tmp_path, config=config)
  result = train(_meddled(job, 12, how=_strange))
  batches = [*range(1, 11), *range(13, 17)]
  _assert_same(result.state, _stepped(job, list(batches)))
  assert _spikes(job) == [(12, "back to step 10")]


def test_a_run_does_not_go_back_forever(tiny, tmp_path):
  config = _config(tiny, nonfinite="rewind", most_in_a_row=2)
  job = tiny.job(tmp_path, config=config)
  with pytest.raises(errors.TrainingStopped) as error:
    train(_meddled(job, *range(3, 40), how=_poisoned))
  assert str(error.value) == (
    "tiny: step 3: not finite, loss nan, gradient norm nan; the run has gone"
    " back to step 2 2 times; the last good checkpoint is of step 2, in"
    f" {job.workdir}/checkpoints"
  )
  assert _spikes(job) == [(3, "back to step 2")] * 2


def test_without_a_checkpoint_of_before_it_stops(tiny, tmp_path):
  config = _config(tiny, nonfinite="rewind", rewind_margin=5)
  job = tiny.job(tmp_path, config=config)
  with pytest.raises(errors.TrainingStopped) as error:
    train(_meddled(job, 3, how=_poisoned))
  assert str(error.value) == (
    "tiny: step 3: not finite, loss nan, gradient norm nan; there is no"
    " checkpoint of 5 steps before it to go back to"
  )
