"""The learning of a growth, on a sequence that a tiny model learns at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  LigoConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  ScaleUp,
  TrainConfig,
)
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.types import Batch
from aquila_jax.data.loader import DataState
from aquila_jax.growth import ligo
from aquila_jax.growth.scale_up import make_growth
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.learned_growth import (
  GrowthJob,
  Learned,
  learn_growth,
  operator_training,
  planned_flops,
)
from aquila_jax.planning import counting
from aquila_jax.sharding.mesh import make_mesh
from tests.growth import tiny

SOURCE = tiny.replace(
  tiny.SOURCE, num_layers=2, param_dtype="float32", compute_dtype="float32"
)
TARGET = tiny.replace(
  SOURCE, embed_dim=16, mlp_dim=16, num_heads=8, num_layers=3
)
TRAIN = TrainConfig(
  steps=999,
  batch_size=32,
  num_microbatches=4,
  sequence_length=12,
  optimizer=OptimizerConfig(learning_rate=9.0, weight_decay=0.5),
  log_every=4,
)
OPTIONS = ScaleUp(source="s", method="fpi", optimizer="reset")


def _batches(train: TrainConfig) -> Iterator[tuple[Batch, DataState]]:
  """Rows that count upwards from anywhere; a pure function of the row."""
  rows = 5
  while True:
    starts = np.arange(rows, rows + train.batch_size)[:, None] * 7
    tokens = (starts + np.arange(train.sequence_length)) % SOURCE.vocab_size
    tokens = tokens.astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(train.sequence_length), tokens.shape)
    fields: dict[str, Any] = dict(
      tokens=tokens,
      targets=(tokens + 1) % SOURCE.vocab_size,
      weights=ones.astype(np.float32),
      segments=ones,
      positions=positions.astype(np.int32),
      languages=ones,
    )
    rows += train.batch_size
    state = DataState(rows=rows, tokens={"a": rows * train.sequence_length})
    yield Batch(**fields), state


def _source(**fields) -> StoredModel:
  defaults: dict[str, Any] = dict(
    config=SOURCE,
    lineage=Lineage(events=(Event(kind="scratch", name="dense"),)),
    params=tiny.params(SOURCE),
    tokenizer="{}",
  )
  return StoredModel(**(defaults | fields))


def _job(**fields) -> GrowthJob:
  target = fields.get("target", TARGET)
  source = fields.setdefault("source", _source())
  growth = make_growth(source.config, target, OPTIONS)
  defaults: dict[str, Any] = dict(
    name="grown",
    target=target,
    width=growth.width,
    layers=growth.layers.copies,
    config=LigoConfig(steps=10, learning_rate=0.2),
    train=TRAIN,
    mesh=make_mesh(MeshConfig()),
    batches=_batches,
    path="config.stages.grown.init.ligo",
  )
  return GrowthJob(**(defaults | fields))


@functools.cache
def _learned() -> Learned:
  average = jax.tree.map(lambda leaf: 2 * leaf, tiny.params(SOURCE))
  return learn_growth(_job(source=_source(ema=average)))


def test_it_starts_at_the_loss_of_the_depth_rule_and_lowers_it():
  learned = _learned()
  batch, _ = next(_batches(operator_training(LigoConfig(), TRAIN)))
  # FPI grows this width exactly, so the loss is that of the source with its
  # first layer doubled; noise changes no function either.
  params = dict(tiny.params(SOURCE))
  params["layers"] = jax.tree.map(
    lambda leaf: leaf[np.array([0, 0, 1])], params["layers"]
  )
  deeper = decoder_lm.DecoderLM(tiny.replace(SOURCE, num_layers=3))
  out: Any = jax.jit(deeper.apply)(
    {"params": params},
    batch.tokens,
    positions=batch.positions,
    segments=batch.segments,
  )
  logits = np.asarray(out.logits, np.float64)
  targets = np.asarray(batch.targets)[..., None]
  chosen = np.take_along_axis(logits, targets, axis=-1)
  nats = np.log(np.exp(logits).sum(axis=-1)) - chosen[..., 0]
  # Float32: logits of about 10 have errors of 1e-6.
  assert abs(learned.losses[0] - nats.mean()) < 1e-5
  assert learned.losses[-1] < learned.losses[0] - 0.5


def test_the_grown_model_is_the_operator_on_the_source():
  learned = _learned()
  axes = decoder_lm.parameter_axes(SOURCE)
  expected = jax.jit(lambda op, p: ligo.apply_operator(op, p, axes))(
    learned.operator, tiny.params(SOURCE)
  )
  shapes = decoder_lm.abstract_params(TARGET)

  def check(leaf, average, wanted, declared):
    assert (leaf.shape, leaf.dtype) == (declared.shape, declared.dtype)
    np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-6)
    # The average was twice the parameters.
    np.testing.assert_allclose(average, 2 * wanted, rtol=1e-6, atol=1e-6)

  jax.tree.map(check, learned.params, learned.ema, expected, shapes)


def test_it_counts_what_it_took():
  learned = _learned()
  assert learned.steps == 10
  assert learned.tokens == 10 * 8 * 12
  train = operator_training(_job().config, TRAIN)
  assert learned.flops == planned_flops(SOURCE, TARGET, train)
  # Ten batches of 8 rows, from row 5.
  assert learned.data_state == DataState(rows=85, tokens={"a": 85 * 12})


def test_the_same_job_gives_the_same_bits_and_says_how_it_stands(capsys):
  _learned()
  capsys.readouterr()
  again = learn_growth(_job())
  assert again.losses == _learned().losses
  jax.tree.map(np.testing.assert_array_equal, again.params, _learned().params)
  lines = capsys.readouterr().err.splitlines()
  assert [line.split("  ")[0] for line in lines] == [
    f"grown: LiGO: step {step}/10" for step in (4, 8, 10)
  ]


def test_only_noise_tells_copies_apart():
  # Both rows of two copies: exactly equal sums, in whatever order.
  def apart(learned: Learned) -> float:
    matrix = np.asarray(learned.operator.writes["embed"])
    return float(np.abs(matrix[:8] - matrix[8:]).max())

  silent = learn_growth(
    _job(config=LigoConfig(steps=10, learning_rate=0.2, noise=0.0))
  )
  # Adam divides by the gradient's size, so a rounding error of the smallest
  # gradients may grow, but not to a step.
  assert apart(silent) < 0.002
  assert apart(_learned()) > 0.02
  other = learn_growth(_job(seed=1))
  assert other.losses[0] == pytest.approx(_learned().losses[0], abs=1e-5)
  assert other.losses[-1] != _learned().losses[-1]


def test_a_loss_that_is_not_finite_stops():
  params = jax.tree.map(jnp.array, tiny.params(SOURCE))
  params["embedding"]["table"] = params["embedding"]["table"].at[3].set(np.nan)
  with pytest.raises(errors.TrainingStopped) as stopped:
    learn_growth(_job(source=_source(params=params)))
  assert str(stopped.value) == (
    "grown: LiGO: loss, gradients or operator are not finite at step 1; nothing"
    " was written; a smaller"
    " config.stages.grown.init.ligo.learning_rate=0.2 may help"
  )


def test_a_batch_that_does_not_fit_the_devices_is_refused():
  config = LigoConfig(steps=2, batch_size=12)
  with pytest.raises(errors.UserError) as refused:
    learn_growth(_job(config=config))
  assert str(refused.value) == (
    "config.stages.grown.init.ligo.batch_size=12: expected a multiple of 8, 1"
    " microbatches spread over 8 devices; the nearest is 16"
  )


def test_nothing_to_grow_is_nothing_to_learn():
  def unread(train):
    raise AssertionError(train)

  target = tiny.replace(SOURCE, param_dtype="bfloat16")
  learned = learn_growth(_job(target=target, batches=unread))
  assert (learned.steps, learned.tokens, learned.flops) == (0, 0, 0.0)
  jax.tree.map(
    lambda leaf, own: np.testing.assert_array_equal(
      leaf, own.astype(jnp.bfloat16)
    ),
    learned.params,
    tiny.params(SOURCE),
  )
  event = Event(kind="scale_up", name="grown")
  assert learned.recorded(event, data_identity={}) == event
  train = operator_training(LigoConfig(), TRAIN)
  assert planned_flops(SOURCE, target, train) == 0.0


def test_sharded_is_as_unsharded():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
  learned = learn_growth(_job(mesh=mesh))
  # Float32, sums in another order, ten updates of which Adam makes the smallest
  # gradients large.
  np.testing.assert_allclose(learned.losses, _learned().losses, atol=1e-3)


def test_experts_grow_too():
  config = tiny.replace(SOURCE, moe=tiny.MOE)
  target = tiny.replace(config, mlp_dim=16)
  source = _source(config=config, params=tiny.params(config))
  mesh = make_mesh(MeshConfig(expert=2))
  learned = learn_growth(_job(source=source, target=target, mesh=mesh))
  assert learned.losses[-1] < learned.losses[0] - 0.1


def test_the_training_of_an_operator():
  own = operator_training(LigoConfig(steps=50, learning_rate=0.3), TRAIN)
  assert (own.steps, own.batch_size, own.sequence_length) == (50, 8, 12)
  assert own.num_microbatches == 1
  assert own.optimizer == OptimizerConfig(
    learning_rate=0.3, warmup_steps=5, schedule="cosine"
  )
  matched = dataclasses.replace(
    TRAIN, steps=0, match_flops="dense", loss=LossConfig(balance=0.5)
  )
  chosen = operator_training(
    LigoConfig(batch_size=3, sequence_length=7), matched
  )
  assert (chosen.batch_size, chosen.sequence_length) == (3, 7)
  assert (chosen.match_flops, chosen.loss.balance) == ("", 0.5)


def test_planned_flops_by_hand():
  # Only F grows, 10 -> 16: gate and up [2 8 10], down [2 10 8]. One product
  # each, whose backward is the gradient of the matrix alone.
  target = tiny.replace(SOURCE, mlp_dim=16)
  train = operator_training(LigoConfig(steps=50), TRAIN)
  products = 3 * 2 * (2 * 8 * 10) * 16
  model = 8 * 12 * counting.train_flops_per_token(target, 12)
  expected = 50 * (model + 2 * products) + products
  assert planned_flops(SOURCE, target, train) == expected


def test_the_lineage_counts_it_as_training():
  learned = Learned(
    params=None,
    ema=None,
    operator=ligo.Operator(writes={}, reads={}, depth={}),
    losses=(3.0, 2.5, 2.0),
    tokens=300,
    flops=7e9,
    data_state=DataState(rows=6, tokens={"a": 300}),
  )
  growth = Event(kind="scale_up", options={"method": "ligo"})
  identity = {"digest": "d", "seed": 4}
  event = learned.recorded(growth, data_identity=identity)
  assert event.options == {
    "method": "ligo",
    "learned": {"first_loss": 3.0, "last_loss": 2.0},
  }
  lineage = Lineage(events=(Event(kind="train", steps=5, flops=1e9), event))
  assert (lineage.steps, lineage.tokens, lineage.flops) == (8, 300, 8e9)
  assert lineage.data_state == {"rows": 6, "tokens": {"a": 300}, **identity}
