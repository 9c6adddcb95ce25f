"""A step of a grown model against the growth of a step of its source."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.experiment_config import OptimizerConfig, ScaleUp
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments, get_moments, set_moments
from aquila_jax.core.types import Params
from aquila_jax.growth import scale_up as scale_up_lib
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.training.optimizers import make_optimizer
from tests.growth import tiny

# One layer: growth is the same in every layer.
SOURCE = tiny.replace(tiny.SOURCE, num_layers=1)
# D 8 -> 24, F 10 -> 17 (copies of 1 and of 2), K 2 -> 4, G 3 -> 5.
TRIPLE = dict(embed_dim=24, mlp_dim=17, num_kv_heads=4, num_heads=20)
# D 8 -> 16, F 10 -> 20, G 3 -> 4; and then D 16 -> 32, F 20 -> 33, K 2 -> 4.
DOUBLE = dict(embed_dim=16, mlp_dim=20, num_heads=8)
QUADRUPLE = dict(embed_dim=32, mlp_dim=33, num_kv_heads=4, num_heads=16)

# An epsilon that is not small beside sqrt(nu), so that it shows, and a clipping
# that is never active.
CONFIG = OptimizerConfig(
  learning_rate=0.05, epsilon=0.03, clip_norm=1e6, weight_decay=0.3
)


def _source(**fields: Any) -> StoredModel:
  """A model whose moments, of count 7, have nothing to do with its gradient."""
  config = tiny.replace(SOURCE, **fields)
  first, second = (tiny.params(config, seed=seed) for seed in (1, 2))
  return tiny.stored(
    config,
    moments=AdamMoments(
      count=jnp.asarray(7, jnp.int32),
      mu=jax.tree.map(lambda x: 0.1 * x, first),
      nu=jax.tree.map(lambda x: 0.1 * jnp.square(x), second),
    ),
  )


def _grown(model: StoredModel, **sizes: int) -> StoredModel:
  target: ModelConfig = tiny.replace(model.config, **sizes)
  return scale_up(model, target, ScaleUp(source="dense", method="fpi"))


def _gradients(model: StoredModel) -> Params:
  return tiny.gradients(model.config, model.params)


def _step(
  model: StoredModel, growth_lr: Any = "plain", **fields: Any
) -> StoredModel:
  """A step of training, as training/step.py makes it."""
  config = dataclasses.replace(CONFIG, growth_lr=growth_lr, **fields)
  optimizer = make_optimizer(
    config,
    decoder_lm.parameter_axes(model.config),
    copies=model.lineage.copies,
  )
  assert model.moments is not None

  @jax.jit
  def step(params, moments, gradients):
    state = set_moments(optimizer.init(params), moments)
    updates, state = optimizer.update(gradients, state, params)
    rate = jnp.asarray(config.learning_rate, jnp.float64)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, get_moments(state)

  params, moments = step(model.params, model.moments, _gradients(model))
  event = Event(kind="train", options={"optimizer": {"growth_lr": growth_lr}})
  return dataclasses.replace(
    model, params=params, moments=moments, lineage=model.lineage.then(event)
  )


def _distance(a: Any, b: Any) -> float:
  """The largest difference of two trees, as a share of the largest value."""
  ours, theirs = tiny.arrays(a), tiny.arrays(b)
  assert ours.keys() == theirs.keys()
  largest = max(np.abs(leaf).max() for leaf in theirs.values())
  return max(np.abs(ours[k] - theirs[k]).max() for k in ours) / largest


def _assert_same(ours: StoredModel, theirs: StoredModel) -> None:
  """To the rounding of sums over hundreds of terms in float64."""
  assert ours.moments is not None and theirs.moments is not None
  assert _distance(ours.params, theirs.params) < 1e-13
  assert _distance(ours.moments.mu, theirs.moments.mu) < 1e-13
  assert _distance(ours.moments.nu, theirs.moments.nu) < 1e-13
  assert int(ours.moments.count) == int(theirs.moments.count)


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("tied, decay_vectors", [(False, False), (True, True)])
def test_a_step_commutes_with_growth_in_function_space_only(
  tied, decay_vectors
):
  source = _source(tied_embeddings=tied)
  grown = _grown(source, **TRIPLE)
  expected = _grown(_step(source, decay_vectors=decay_vectors), **TRIPLE)
  ours = _step(grown, "function_space", decay_vectors=decay_vectors)
  _assert_same(ours, expected)
  plain = _step(grown, decay_vectors=decay_vectors)
  assert _distance(plain.params, expected.params) > 0.02
  logits, moved = (tiny.logits(m.config, m.params) for m in (expected, plain))
  assert np.abs(moved - logits).max() > 0.3


def test_steps_before_a_second_growth_are_carried_through_it():
  """Step, grow, step, grow and step is three steps and two growths."""
  source = _source(tied_embeddings=True)
  expected = _grown(_grown(_step(_step(_step(source))), **DOUBLE), **QUADRUPLE)
  once = _step(_grown(_step(source), **DOUBLE), "function_space")
  ours = _step(_grown(once, **QUADRUPLE), "function_space")
  _assert_same(ours, expected)


def test_after_a_plain_step_the_last_growth_counts_alone():
  """A step of what was trained plainly, whatever it had grown from."""
  once = _step(_grown(_source(tied_embeddings=True), **DOUBLE))
  ours = _step(_grown(once, **QUADRUPLE), "function_space")
  _assert_same(ours, _grown(_step(once), **QUADRUPLE))


def test_clipping_breaks_it():
  """The norm of the gradient is another one after growth."""
  source = _source()
  grown = _grown(source, **TRIPLE)
  norm, grown_norm = (
    np.sqrt(sum(np.sum(g**2) for g in tiny.arrays(_gradients(m)).values()))
    for m in (source, grown)
  )
  assert abs(grown_norm / norm - 1) > 0.1
  active = float(min(norm, grown_norm)) / 2
  ours = _step(grown, "function_space", clip_norm=active)
  theirs = _grown(_step(source, clip_norm=active), **TRIPLE)
  assert _distance(ours.params, theirs.params) > 1e-3


def _grown_lineage(sizes: dict[str, int], **options: Any) -> Lineage:
  """The lineage of a growth that is not made."""
  source = StoredModel(
    config=SOURCE,
    lineage=Lineage(events=(Event(kind="train", steps=4),)),
    params=decoder_lm.abstract_params(SOURCE),
    tokenizer=None,
  )
  return scale_up_lib.grown_header(
    source,
    tiny.replace(SOURCE, **sizes),
    ScaleUp(source="dense", **options),
    seed=5,
    name="wide",
    path="config.model",
  ).lineage


def test_the_lineage_of_a_growth_has_its_copies_in_runs():
  lineage = _grown_lineage(TRIPLE, method="fpi")
  assert lineage.events[-1].copies == {
    "embed": [[0, 8, 3], [0, 8, 3], [0, 8, 3]],
    "mlp": [[0, 7, 2], [7, 3, 1], [0, 7, 2]],
    "kv_head": [[0, 2, 2], [0, 2, 2]],
    "q_per_kv": [[0, 2, 2], [2, 1, 1], [0, 2, 2]],
  }
  assert lineage.trained_steps == 4


def test_random_weights_are_no_copies():
  lineage = _grown_lineage(TRIPLE, method="random", optimizer="reset")
  assert lineage.events[-1].copies == {}
  assert lineage.copies is None
  assert lineage.trained_steps is None


def test_random_maps_are_counted_as_they_are_drawn():
  options: dict[str, Any] = dict(method="fpi", width_map="random")
  target = tiny.replace(SOURCE, mlp_dim=40)
  growth = scale_up_lib.make_growth(
    SOURCE, target, ScaleUp(source="dense", **options), seed=5
  )
  copies = _grown_lineage(dict(mlp_dim=40), **options).copies
  assert copies is not None
  np.testing.assert_array_equal(copies["mlp"], growth.width["mlp"].divisors)
  assert len(set(copies["mlp"])) > 2
  np.testing.assert_array_equal(copies["embed"], 1)
