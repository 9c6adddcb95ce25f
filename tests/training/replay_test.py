"""A step that is taken again is the step that was."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from aquila_jax.core.experiment_config import CheckpointConfig, SpikeConfig
from aquila_jax.training.loop import train
from aquila_jax.training.metrics import read_rows
from aquila_jax.training.replay import replay

pytestmark = pytest.mark.usefixtures("steps_built_once")


@pytest.fixture(scope="module")
def job(tiny, tmp_path_factory):
  """A run of which every step is logged and every third is saved."""
  config = tiny.config(
    steps=7,
    log_every=1,
    num_microbatches=2,
    checkpoint=CheckpointConfig(every_steps=3, every_seconds=0.0, keep_last=9),
  )
  made = tiny.job(
    tmp_path_factory.mktemp("run"), config=config, model=tiny.moe()
  )
  train(made)
  return made


def _files(job):
  return {
    path: path.read_bytes()
    for path in pathlib.Path(job.workdir).rglob("*")
    if path.is_file()
  }


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize(
  ("step", "checkpoint"), [(1, 0), (3, 0), (4, 3), (6, 3), (7, 6)]
)
def test_it_has_the_numbers_of_the_run_and_changes_nothing(
  job, step, checkpoint
):
  before = _files(job)
  said = []
  found = replay(job, step, say=said.append)
  assert _files(job) == before
  rows = read_rows(job.workdir / "metrics.jsonl")
  assert found.checkpoint == checkpoint
  assert found.loss == rows[step - 1]["loss"]
  assert found.gradient_norm == rows[step - 1]["gradient_norm"]
  assert found.update_norm == rows[step - 1]["update_norm"]
  assert list(found.losses) == [row["loss"] for row in rows[checkpoint:step]]
  assert found.is_finite
  assert bool(said) == (step > checkpoint + 1)
  # The parts add up to the whole: 300 to 1000 roundings of 2^-24 at most.
  weights = found.batch.weights
  mean = np.sum(found.nats * weights, dtype=np.float64) / weights.sum()
  np.testing.assert_allclose(mean, found.loss, rtol=1000 * 2.0**-24)
  norm = np.sqrt(sum(leaf.norm**2 for leaf in found.leaves))
  np.testing.assert_allclose(norm, found.gradient_norm, rtol=1000 * 2.0**-24)
  norms = [leaf.norm for leaf in found.leaves]
  assert norms == sorted(norms, reverse=True)
  assert not any(leaf.num_bad for leaf in found.leaves)


def test_a_step_that_was_gone_back_from_is_found_in_its_place(tiny, tmp_path):
  """The batch after the checkpoint, which the run then passed over."""
  config = tiny.config(
    steps=8,
    log_every=4,
    spikes=SpikeConfig(nonfinite="rewind"),
    checkpoint=CheckpointConfig(every_steps=2, every_seconds=0.0, keep_last=9),
  )
  job = tiny.job(tmp_path, config=config)
  inner = job.input.batches

  def batches(state):
    for batch, after in inner(state):
      if after.rows == 3 * config.batch_size:
        weights = batch.weights.copy()
        weights[5, 2] = np.nan
        batch = batch.replace(weights=weights)
      yield batch, after

  job = dataclasses.replace(
    job, input=dataclasses.replace(job.input, batches=batches)
  )
  train(job)
  found = replay(job, 3)
  assert found.checkpoint == 2
  assert not found.is_finite
  assert np.isnan(found.batch.weights[5, 2])
  assert found.leaves[0].num_bad > 0
  assert np.isnan(found.loss)
