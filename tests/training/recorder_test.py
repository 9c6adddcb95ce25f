from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import jax.numpy as jnp
import pytest

from aquila_jax.core.types import RoutingStats
from aquila_jax.training.metrics import scalars
from aquila_jax.training.recorder import Recorder, Window, routing_fields
from aquila_jax.training.step import StepMetrics


def _metrics(loss=1.0, *, weight=4.0, languages=(3.0, 1.0), finite=True):
  by_language = jnp.array(languages)
  return StepMetrics(
    total_loss=jnp.float32(loss + 0.5),
    loss=jnp.float32(loss),
    lm_z=jnp.float32(2.0),
    lm_max_z=jnp.float32(3.0),
    weight=jnp.float32(weight),
    language_nats=loss * by_language,
    language_weight=by_language,
    routing=None,
    gradient_norm=jnp.float32(0.25),
    parameter_norm=jnp.float32(16.0),
    update_norm=jnp.float32(0.125),
    learning_rate=jnp.float32(0.5),
    finite=jnp.array(finite),
  )


def _recorder(**fields):
  defaults: dict[str, Any] = dict(
    languages=("en", "zh"),
    tokens_per_step=8,
    flops_per_token=100.0,
    peak_flops=1e6,
  )
  return Recorder(**(defaults | fields))


def test_losses_are_weighted_means_over_the_window():
  recorder = _recorder()
  recorder.add(1, _metrics(1.0, weight=4.0, languages=(3.0, 1.0)))
  recorder.add(2, _metrics(3.0, weight=2.0, languages=(2.0, 0.0)))
  assert recorder.fetch() == []
  row = recorder.row(2, epochs={"wiki": 0.5})
  assert row["loss"] == (1.0 * 4 + 3.0 * 2) / 6
  assert row["total_loss"] == (1.5 * 4 + 3.5 * 2) / 6
  assert row["loss_en"] == (1.0 * 3 + 3.0 * 2) / 5
  assert row["loss_zh"] == 1.0
  for name, value in (
    ("step", 2),
    ("lm_z_loss", 2.0),
    ("lm_max_z_loss", 3.0),
    ("gradient_norm", 0.25),
    ("parameter_norm", 16.0),
    ("update_norm", 0.125),
    ("learning_rate", 0.5),
    ("tokens", 16),
    ("flops", 1600.0),
    ("epochs", {"wiki": 0.5}),
  ):
    assert row[name] == value, name
  assert "expert_load" not in row


def test_a_row_starts_a_new_window():
  recorder = _recorder()
  for step, loss in ((1, 1.0), (2, 5.0)):
    recorder.add(step, _metrics(loss))
    recorder.fetch()
    assert recorder.row(step, epochs={})["loss"] == loss


def test_a_language_without_tokens_has_no_loss():
  recorder = _recorder()
  recorder.add(1, _metrics(languages=(4.0, 0.0)))
  recorder.fetch()
  row = recorder.row(1, epochs={})
  assert (row["loss_en"], row["loss_zh"]) == (1.0, None)


def test_a_saved_window_goes_on_as_if_nothing_had_happened():
  losses = [1.1, 2.3, 0.7]
  unbroken, first = _recorder(), _recorder()
  for step, loss in enumerate(losses, start=1):
    unbroken.add(step, _metrics(loss))
  unbroken.fetch()
  first.add(1, _metrics(losses[0]))
  first.fetch()
  saved = json.loads(json.dumps(dataclasses.asdict(first.window)))
  second = _recorder(step=1, window=Window(**saved))
  second.add(2, _metrics(losses[1]))
  second.add(3, _metrics(losses[2]))
  second.fetch()
  one, two = unbroken.row(3, epochs={}), second.row(3, epochs={})
  for name in ("loss", "total_loss", "loss_en", "loss_zh", "tokens", "flops"):
    assert one[name] == two[name], name


def test_steps_that_are_not_finite_are_named():
  recorder = _recorder()
  for step in range(1, 6):
    recorder.add(step, _metrics(finite=step not in (2, 4)))
  assert [event.step for event in recorder.fetch()] == [2, 4]
  assert recorder.is_empty
  assert recorder.fetch() == []


def test_rates_are_of_the_window_and_seconds_of_the_stage(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  recorder = _recorder(step=10, wall_s=50.0)
  recorder.add(11, _metrics())
  recorder.waited(0.5)
  now[0] += 5.0
  recorder.clock.exclude(3.0)  # a validation
  recorder.fetch()
  row = recorder.row(11, epochs={})
  assert row["wall_s"] == 52.0
  assert row["tokens_per_s"] == 8 / 2.0
  assert row["mfu"] == 4.0 * 100.0 / 1e6
  assert row["data_wait_share"] == 0.25
  assert (row["tokens"], row["flops"]) == (88, 8800.0)
  now[0] += 1.0
  recorder.add(12, _metrics())
  recorder.fetch()
  row = recorder.row(12, epochs={})
  assert (row["tokens_per_s"], row["data_wait_share"]) == (8.0, 0.0)


def test_routing_is_reported_a_layer():
  routing = RoutingStats(
    load=jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0]]),
    probability=jnp.full((2, 4), 0.25),
    sequence_balance=jnp.array([7.0, 7.0]),
    z_loss=jnp.array([3.0, 5.0]),
    entropy=jnp.array([0.5, 1.0]),
    top_gate=jnp.array([0.75, 0.5]),
    dropped=jnp.array([0.0, 0.125]),
  )
  metrics = _metrics().replace(routing=routing, balance=jnp.array([1.0, 2.0]))
  fields = routing_fields(metrics, layers=(0, 1), languages=("zh", "en"))
  assert fields.pop("load_entropy") == pytest.approx([math.log(4), math.log(2)])
  assert fields == {
    "balance_loss": 1.5,
    "router_z_loss": 4.0,
    "expert_load": [[0.25, 0.25, 0.25, 0.25], [0.5, 0.0, 0.5, 0.0]],
    "load_max_over_mean": [1.0, 2.0],
    "dropped_share": [0.0, 0.125],
    "router_entropy": [0.5, 1.0],
    "top_gate": [0.75, 0.5],
  }
  weighed = metrics.replace(balance_weights=jnp.array([0.5, 0.25]))
  fields = routing_fields(weighed, layers=(0, 1), languages=("zh", "en"))
  assert fields["balance_weight"] == [0.5, 0.25]


def test_routing_of_some_layers_is_reported_at_their_numbers():
  ones = jnp.ones(2)
  routing = RoutingStats(
    load=jnp.array([[0.5, 0.5], [1.0, 0.0]]),
    probability=jnp.full((2, 2), 0.5),
    sequence_balance=ones,
    z_loss=ones,
    entropy=ones,
    top_gate=jnp.array([0.75, 0.5]),
    dropped=jnp.array([0.0, 0.125]),
    # Of all assignments a quarter is of the first language.
    group_load=jnp.array(
      [[[0.25, 0.0], [0.25, 0.5]], [[0.25, 0.0], [0.75, 0.0]]]
    ),
  )
  metrics = _metrics().replace(
    routing=routing,
    balance=jnp.array([1.0, 2.0]),
    balance_weights=jnp.array([0.5, 0.25]),
  )
  fields = routing_fields(metrics, layers=(1, 3), languages=("zh", "en"))
  assert fields["balance_loss"] == 1.5
  assert fields["expert_load"] == [None, [0.5, 0.5], None, [1.0, 0.0]]
  assert fields["load_max_over_mean"] == [None, 1.0, None, 2.0]
  assert fields["dropped_share"] == [None, 0.0, None, 0.125]
  assert fields["top_gate"] == [None, 0.75, None, 0.5]
  assert fields["expert_load_by_language"] == {
    "zh": [None, [1.0, 0.0], None, [1.0, 0.0]],
    "en": [None, [1 / 3, 2 / 3], None, [1.0, 0.0]],
  }
  assert fields["balance_weight"] == [None, 0.5, None, 0.25]
  names = [name for name, _ in scalars(fields)]
  assert "expert_load/3/0" in names and "expert_load/0/0" not in names
