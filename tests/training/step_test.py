from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core.experiment_config import (
  AdaptiveBalance,
  FreezeConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
)
from aquila_jax.core.moments import get_moments
from aquila_jax.kernels.attention import api as attention_api
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training import inputs, losses
from aquila_jax.training import state as state_lib
from aquila_jax.training import step as step_lib
from aquila_jax.training.balance import initial_weights
from aquila_jax.training.freezing import trainable_masks
from aquila_jax.training.optimizers import learning_rate, make_optimizer

# Float32 through two layers, summed in another order.
_RTOL, _ATOL = 2e-4, 2e-6


def _gradient(state):
  """Of a first step, times 0.1."""
  # The update is not compared: it is close to the sign of the gradient, and
  # where that is zero but for rounding, it is the sign of the rounding.
  return get_moments(state.opt_state).mu


_ALL_TERMS = LossConfig(router_z=0.1, lm_z=0.01, lm_max_z=0.01)


@pytest.fixture(scope="module")
def run(tiny):
  """Runs steps of a config and returns the states and metrics."""

  def run(
    config, *, model=None, steps=1, mesh=None, new_indices=None, params=None
  ):
    model = model or tiny.model()
    mesh = mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1])
    axes = decoder_lm.parameter_axes(model)
    shapes = decoder_lm.abstract_params(model)
    optimizer = make_optimizer(config.optimizer, axes)
    like = state_lib.abstract_state(
      shapes,
      optimizer=optimizer,
      axes=axes,
      mesh=mesh,
      keep_ema=config.optimizer.ema_decay is not None,
      balance_weights=initial_weights(config.loss, model),
    )
    batch_like = step_lib.abstract_batch(config, mesh=mesh)
    step = step_lib.jit_train_step(
      step_lib.make_train_step(
        config,
        model=model,
        optimizer=optimizer,
        schedule=learning_rate(config.optimizer, config.steps),
        masks=trainable_masks(
          config.freeze, axes=axes, shapes=shapes, new_indices=new_indices
        ),
        num_languages=2,
      ),
      state=like,
      batch=batch_like,
      mesh=mesh,
    )
    params = tiny.params(model) if params is None else params
    state = state_lib.place_initial(
      state_lib.InitialModel(params=params),
      optimizer=optimizer,
      like=like,
      balance_weights=initial_weights(config.loss, model),
    )
    metrics = None
    for i in range(steps):
      state, metrics = step(state, inputs.place(tiny.batch(i), like=batch_like))
    return state, metrics

  return run


def _norm(tree):
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
  return np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))


def _close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=_RTOL, atol=_ATOL), a, b
  )


@pytest.fixture(scope="module")
def dense(tiny, run):
  return run(tiny.config())


def test_metrics_are_those_of_the_step(tiny, dense):
  state, metrics = dense
  model = tiny.model()
  params, batch = tiny.params(model), tiny.batch(0)

  def loss(params):
    out: Any = decoder_lm.DecoderLM(model).apply(
      {"params": params},
      jnp.asarray(batch.tokens),
      positions=jnp.asarray(batch.positions),
      segments=jnp.asarray(batch.segments),
    )
    log_probability = jax.nn.log_softmax(out.logits, axis=-1)
    chosen = jnp.take_along_axis(
      log_probability, jnp.asarray(batch.targets)[..., None], axis=-1
    )[..., 0]
    return -jnp.sum(chosen * batch.weights) / batch.weights.sum()

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  change = jax.tree.map(jnp.subtract, state.params, params)
  np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
  np.testing.assert_allclose(metrics.gradient_norm, _norm(grads), rtol=1e-4)
  np.testing.assert_allclose(
    metrics.parameter_norm, _norm(state.params), rtol=1e-5
  )
  np.testing.assert_allclose(metrics.update_norm, _norm(change), rtol=1e-4)
  # The first of two warm-up steps to a peak of 0.01.
  np.testing.assert_allclose(metrics.learning_rate, 0.005, rtol=1e-6)
  assert bool(metrics.finite) and metrics.routing is None
  assert (int(state.step), int(get_moments(state.opt_state).count)) == (1, 1)

  config = tiny.config()
  optimizer = make_optimizer(config.optimizer, decoder_lm.parameter_axes(model))
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  moved = jax.tree.map(lambda p, u: p - 0.005 * u, params, updates)
  # Adam's first update is close to the sign of the gradient, so where that is
  # tiny its rounding is as large as the update; there are few such elements.
  far = [
    np.abs(np.asarray(a - b)) > 1e-4
    for a, b in zip(
      jax.tree.leaves(moved), jax.tree.leaves(state.params), strict=True
    )
  ]
  assert sum(x.sum() for x in far) < 0.001 * sum(x.size for x in far)


def test_loss_goes_down(tiny, run, dense):
  _, metrics = run(tiny.config(steps=30), steps=30)
  assert float(metrics.loss) < float(dense[1].loss) - 0.3


def test_accumulation_changes_nothing(tiny, run):
  loss = dataclasses.replace(_ALL_TERMS, balance=0.1)
  states = [
    run(tiny.config(loss=loss, num_microbatches=n), model=tiny.moe())
    for n in (1, 2)
  ]
  (one, one_metrics), (two, two_metrics) = states
  _close(_gradient(one), _gradient(two))
  _close(one_metrics, two_metrics)
  np.testing.assert_allclose(one_metrics.routing.load.sum(-1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(
    one_metrics.balance, one_metrics.routing.balance_loss, rtol=1e-5
  )


def _bias(params):
  return np.asarray(params["layers"]["mlp"]["router"]["selection_bias"])


def test_a_selection_bias_is_moved_by_its_rule_alone(tiny, run):
  """Not decayed, and not where the layer is frozen; averaged as all else."""
  model = tiny.moe()
  moe = dataclasses.replace(model.moe, selection_bias=True)
  model = dataclasses.replace(model, moe=moe)
  params = jax.tree.map(jnp.copy, tiny.params(model))
  assert not _bias(params).any()
  start = jnp.asarray([[0.5, 0.0, 0.0, 0.5], [0.0, 0.5, 0.5, 0.0]])
  params["layers"]["mlp"]["router"]["selection_bias"] = start
  optimizer = OptimizerConfig(
    learning_rate=0.1, decay_vectors=True, ema_decay=0.75
  )
  config = tiny.config(
    optimizer=optimizer,
    freeze=FreezeConfig(layers=(0, 1)),
    loss=LossConfig(bias_rate=0.125, adaptive_balance=AdaptiveBalance()),
  )
  state, metrics = run(config, model=model, params=params)
  moved = 0.125 * np.sign(0.25 - np.asarray(metrics.routing.load[1]))
  expected = np.stack([start[0], start[1] + moved])
  assert np.abs(moved).sum() > 0
  np.testing.assert_array_equal(_bias(state.params), expected)
  average = np.stack([start[0], start[1] + 0.25 * moved])
  np.testing.assert_array_equal(_bias(state.ema), average)
  moments = get_moments(state.opt_state)
  assert not _bias(moments.mu).any() and not _bias(moments.nu).any()
  # The weights of the step are those before it.
  before = np.full(2, 0.001, np.float32)
  np.testing.assert_array_equal(metrics.balance_weights, before)
  load = np.asarray(metrics.routing.load, np.float64)
  target = np.minimum(0.2 * np.maximum(load - 0.25, 0).sum(-1), 0.01)
  np.testing.assert_allclose(
    state.balance_weights, 0.99 * before + 0.01 * target, rtol=1e-5
  )


def test_sharded_matches_one_device(tiny, run):
  config = tiny.config(loss=_ALL_TERMS, num_microbatches=2)
  one, one_metrics = run(config, model=tiny.moe())
  mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
  four, four_metrics = run(config, model=tiny.moe(), mesh=mesh)
  _close(_gradient(one), _gradient(four))
  _close(one_metrics, four_metrics)


def _bits(tree):
  return jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree)


@pytest.fixture(scope="module")
def frozen(tiny, run):
  """Parameters, and the states after one and two steps with all of freezing."""
  model = tiny.model()
  # -0.0 + 0.0 is 0.0: an update of zero would change a bit. The head is not
  # set, so that a gradient flows everywhere else.
  params = dict(tiny.params(model))
  params["embedding"] = jax.tree.map(
    lambda x: x.at[:, 0].set(-0.0), params["embedding"]
  )
  optimizer = OptimizerConfig(
    learning_rate=0.1, decay_vectors=True, ema_decay=0.75, clip_norm=1e-3
  )
  config = tiny.config(
    optimizer=optimizer,
    freeze=FreezeConfig(axes=("vocab",), layers=(0, 1), new_only=True),
  )
  new_indices = {"mlp": [(20, 24)], "layer": [(0, 1)]}
  states = [
    run(
      config, model=model, steps=steps, params=params, new_indices=new_indices
    )
    for steps in (1, 2)
  ]
  return params, states


def test_frozen_elements_keep_their_bits(frozen):
  params, (_, (state, _)) = frozen
  for tree in (state.params, state.ema):
    same = jax.tree.map(np.equal, _bits(tree), _bits(params))
    mlp = same["layers"].pop("mlp")
    assert jax.tree.all(jax.tree.map(np.all, same))
    for name, new in (
      ("up_kernel", mlp["up_kernel"][1, :, 20:]),
      ("gate_kernel", mlp["gate_kernel"][1, :, 20:]),
      ("down_kernel", mlp["down_kernel"][1, 20:]),
    ):
      assert not new.any(), name
      assert (~mlp[name]).sum() == new.size, name


def test_frozen_elements_do_not_count_in_the_clip_norm(frozen, dense):
  _, ((state, metrics), _) = frozen
  # Clipped, and before that smaller than with everything trained.
  assert 1e-3 < float(metrics.gradient_norm)
  assert float(metrics.gradient_norm) < 0.5 * float(dense[1].gradient_norm)
  # mu = (1 - beta1) g', and g' has the clip norm.
  mu = get_moments(state.opt_state).mu
  np.testing.assert_allclose(_norm(mu), 0.1 * 1e-3, rtol=1e-4)
  assert not mu["lm_head"]["kernel"].any()


def test_average_follows_its_formula(frozen):
  start, ((first, _), (second, _)) = frozen

  def average(p0, p1, p2):
    p0, p1, p2 = (np.asarray(p, np.float64) for p in (p0, p1, p2))
    return 0.75 * (0.75 * p0 + 0.25 * p1) + 0.25 * p2

  expected = jax.tree.map(average, start, first.params, second.params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    second.ema,
    expected,
  )


def test_a_loss_that_is_not_finite_is_flagged(tiny, run):
  params = dict(tiny.params(tiny.model()))
  params["lm_head"] = jax.tree.map(
    lambda x: x.at[0, 0].set(jnp.nan), params["lm_head"]
  )
  _, metrics = run(tiny.config(), params=params)
  assert not bool(metrics.finite)


@pytest.mark.parametrize("bad", ["total", "grads", "params"])
def test_each_number_that_is_not_finite_is_flagged(dense, bad):
  state, metrics = dense
  terms = losses.LossTerms(
    total=jnp.float32(jnp.inf if bad == "total" else 1.0),
    cross_entropy=metrics.loss,
    lm_z=metrics.lm_z,
    lm_max_z=metrics.lm_max_z,
    weight=metrics.weight,
    language_nats=metrics.language_nats,
    language_weight=metrics.language_weight,
    routing=None,
  )
  good, broken = {"x": jnp.ones(2)}, {"x": jnp.array([1.0, jnp.inf])}
  found = step_lib._metrics(
    terms,
    grads=broken if bad == "grads" else good,
    params=broken if bad == "params" else good,
    change=good,
    rate=metrics.learning_rate,
  )
  assert not bool(found.finite) and bool(metrics.finite)


def test_half_precision_parameters_keep_their_dtype(tiny):
  model = tiny.model(param_dtype="bfloat16")
  config = tiny.config()
  axes = decoder_lm.parameter_axes(model)
  optimizer = make_optimizer(config.optimizer, axes)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  like = state_lib.abstract_state(
    decoder_lm.abstract_params(model),
    optimizer=optimizer,
    axes=axes,
    mesh=mesh,
  )
  step = step_lib.make_train_step(
    config,
    model=model,
    optimizer=optimizer,
    schedule=learning_rate(config.optimizer, config.steps),
    masks=jax.tree.map(lambda _: None, like.params),
    num_languages=2,
  )
  batch = step_lib.abstract_batch(config, mesh=mesh)
  state, _ = jax.eval_shape(step, like, batch)
  dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
  assert dtypes == jax.tree.map(lambda leaf: leaf.dtype, like)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(like.params)} == {
    "bfloat16"
  }


def test_kernels_in_the_step_see_the_mesh(monkeypatch, tiny, run):
  """Those that the compiler cannot divide need it."""
  seen = []
  original = attention_api.causal_attention

  def watched(*args, **options):
    seen.append(dict(jax.sharding.get_abstract_mesh().shape))
    return original(*args, **options)

  monkeypatch.setattr(attention_api, "causal_attention", watched)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
  run(tiny.config(), mesh=mesh)
  of_step = [shape for shape in seen if shape]  # and of making parameters
  assert of_step
  for shape in of_step:
    assert shape == dict(mesh.shape)
