"""What is measured of routers on text, against least squares and NumPy."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.growth import checking, routers
from aquila_jax.growth.calibration import calibrate
from aquila_jax.growth.grown_tree import ArrayTree
from aquila_jax.growth.routers import Sample
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from aquila_jax.models.decoder_lm import DecoderLM
from tests.growth import routing_oracle, tiny

# Two rows, the second shorter: 20 tokens and 4 of padding.
TOKENS = np.concatenate([tiny.TOKENS, tiny.TOKENS[:, ::-1]])
SEGMENTS = np.ones(TOKENS.shape, np.int32)
SEGMENTS[1, 8:] = 0
DOMAINS = np.zeros(TOKENS.shape, np.int32)
DOMAINS[0, 6:] = 1
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape)
SAMPLE = Sample(
  tokens=TOKENS,
  positions=POSITIONS,
  segments=SEGMENTS,
  domains=DOMAINS,
  names=("zh", "en"),
)
UNEVEN = MoeConfig(
  num_experts=4,
  top_k=2,
  block_size=4,
  router_init_std=0.5,
  router_order="softmax_then_topk",
  renormalise=False,
)


def _target(moe: MoeConfig | None, **fields) -> ModelConfig:
  return tiny.replace(tiny.SOURCE, moe=moe, **fields)


def _calibrate(
  target: ModelConfig,
  options: ScaleOut,
  *,
  source: ModelConfig = tiny.SOURCE,
  sample: Sample | None = SAMPLE,
):
  plan = plan_scale_out(source, target, options)
  model = checking.ReadModel(
    config=source, params=ArrayTree(tiny.params(source))
  )
  return calibrate(
    plan.way,
    model,
    target,
    options,
    sample=sample,
    seed=3,
    path="config.model",
  )


@functools.cache
def _inputs(config: ModelConfig) -> np.ndarray:
  """What every FFN reads, [L M D], by the decoder itself."""

  @jax.jit
  def apply(params):
    _, variables = DecoderLM(config).apply(
      {"params": params},
      jnp.asarray(TOKENS, jnp.int32),
      positions=jnp.asarray(POSITIONS),
      segments=jnp.asarray(SEGMENTS),
      capture_intermediates=lambda module, _: module.name == "mlp_norm",
      mutable=["intermediates"],
    )
    found: Any = variables["intermediates"]
    return found["layers"]["mlp_norm"]["__call__"][0]

  return np.asarray(apply(tiny.params(config)))[:, SEGMENTS > 0]


@pytest.fixture
def inputs() -> np.ndarray:
  return _inputs(tiny.SOURCE)


@pytest.mark.parametrize("shards", [1, 2])
def test_the_constant_is_that_of_least_squares(inputs, shards):
  moe = MoeConfig(**(vars(UNEVEN) | dict(num_experts=4 * shards)))
  method = "sparse_upcycling" if shards == 1 else "granular"
  target = _target(moe, mlp_dim=10 // shards)
  found = _calibrate(target, ScaleOut(source="", method=method))
  assert found.constants is not None
  assert found.rows is not None
  for layer, x in enumerate(inputs):
    rows = np.repeat(found.rows[layer], shards, axis=1)
    sums = np.array(
      [
        sum(gate for _, gate in routing_oracle.choice(row @ rows, moe))
        for row in x
      ]
    )
    (best,), (left,), *_ = np.linalg.lstsq(sums[:, None], np.ones(20))
    assert abs(found.constants.values[layer] - best) < 1e-12 * best
    error = np.sqrt(left / 20)
    assert abs(found.constants.errors[layer] - error) < 1e-12


def test_the_constant_brings_the_mixture_near():
  """Nearer than without it, and by what was measured."""
  source = tiny.stored(tiny.SOURCE, moments=None)
  distance = {}
  ways: dict[str, Any] = {
    "measured": dict(),
    "uniform": dict(gate_constant="uniform"),
  }
  for name, options in ways.items():
    grown = scale_out(
      source,
      _target(UNEVEN),
      ScaleOut(source="", **options),
      sample=SAMPLE,
    )
    before = tiny.logits(tiny.SOURCE, source.params)
    after = tiny.logits(_target(UNEVEN), grown.params)
    distance[name] = np.abs(after - before).mean()
    event = grown.lineage.events[-1]
    assert event.growth is not None
    assert ("constants" in event.growth) == (name == "measured")
  assert 1e-6 < distance["measured"] < distance["uniform"] / 2


def test_rows_of_domains_are_their_means(inputs):
  moe = MoeConfig(num_experts=4, top_k=2, router_init_std=0.1)
  options = ScaleOut(source="", method="granular", router="domains")
  found = _calibrate(_target(moe, mlp_dim=5), options)
  assert found.rows is not None
  assert found.rows.shape == (3, 8, 2)
  domains = DOMAINS[SEGMENTS > 0]
  for layer, x in enumerate(inputs):
    means = np.stack([x[domains == i].mean(0) for i in (0, 1)], axis=1)
    # Half the difference of two means is what is left of each.
    half = (means[:, 0] - means[:, 1]) / 2
    half *= 0.1 / np.sqrt(np.mean(half**2))
    wanted = np.stack([half, -half], axis=1)
    np.testing.assert_allclose(found.rows[layer], wanted, rtol=0, atol=1e-6)


def test_clusters_are_found():
  rng = np.random.default_rng(0)
  centres = 10 * rng.standard_normal((4, 8))
  x = np.repeat(centres, 50, axis=0) + 0.1 * rng.standard_normal((200, 8))
  found = routers.cluster_rows(x, count=4, seed=1).T
  order = np.square(found[:, None] - centres[None]).sum(-1).argmin(0)
  assert sorted(order) == [0, 1, 2, 3]
  means = x.reshape(4, 50, 8).mean(1)
  np.testing.assert_allclose(found[order], means, rtol=0, atol=1e-12)


def test_rows_of_clusters_are_those_of_every_layer(inputs):
  moe = MoeConfig(num_experts=3, top_k=2, router_init_std=0.1)
  options = ScaleOut(source="", router="clusters")
  found = _calibrate(_target(moe), options)
  assert found.rows is not None
  for layer, x in enumerate(inputs):
    rows = found.rows[layer]
    centres = routers.cluster_rows(x, count=3, seed=3 + layer)
    # What is left of them: their differences, of the size of drawn rows.
    wanted = centres - centres.mean(1, keepdims=True)
    wanted *= 0.1 / np.sqrt(np.mean(wanted**2))
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-6)


def test_padding_is_not_measured():
  other = SAMPLE.tokens.copy()
  other[SEGMENTS == 0] = 7
  options = ScaleOut(source="")
  first, second = (
    _calibrate(
      _target(UNEVEN),
      options,
      sample=dataclasses.replace(SAMPLE, tokens=tokens),
    )
    for tokens in (SAMPLE.tokens, other)
  )
  assert first.constants is not None
  assert second.constants is not None
  assert np.array_equal(first.constants.values, second.constants.values)


def test_rows_are_read_a_few_at_a_time(monkeypatch):
  whole = _calibrate(_target(UNEVEN), ScaleOut(source=""))
  monkeypatch.setattr(checking, "_AT_ONCE", 12)  # one row
  parts = _calibrate(_target(UNEVEN), ScaleOut(source=""))
  assert whole.constants is not None
  assert parts.constants is not None
  np.testing.assert_allclose(
    parts.constants.values, whole.constants.values, rtol=1e-13
  )


def test_usage_is_the_share_of_the_assignments():
  moe = MoeConfig(num_experts=4, top_k=2, block_size=4)
  source = _target(moe)
  options = ScaleOut(source="", method="merge_by_usage", optimizer="reset")
  found = _calibrate(_target(None), options, source=source)
  assert found.usage is not None
  rows = tiny.arrays(tiny.params(source))["layers/mlp/router/kernel"]
  for layer, x in enumerate(_inputs(source)):
    counts = np.zeros(4)
    for row in x:
      for expert, _ in routing_oracle.choice(row @ rows[layer], moe):
        counts[expert] += 1
    np.testing.assert_allclose(found.usage[layer], counts / 40)


def test_merging_by_usage_weighs_the_experts():
  moe = MoeConfig(num_experts=4, top_k=2, block_size=4)
  source = tiny.stored(_target(moe), moments=None)
  options = ScaleOut(source="", method="merge_by_usage", optimizer="reset")
  found = _calibrate(_target(None), options, source=source.config)
  merged = scale_out(source, _target(None), options, sample=SAMPLE, seed=3)
  assert found.usage is not None
  after = np.asarray(merged.params["layers"]["mlp"]["down_kernel"])
  before = np.asarray(source.params["layers"]["mlp"]["down_kernel"])
  wanted = np.einsum("LE,LEFD->LFD", found.usage, before)
  np.testing.assert_allclose(after, wanted, rtol=0, atol=1e-15)


REFUSED: dict[str, tuple[Any, Any, str]] = {
  "rows without text": (
    dict(router="clusters"),
    None,
    "config.init.router='clusters': it is measured on text, and none is given",
  ),
  "more copies than domains": (
    dict(router="domains"),
    SAMPLE,
    "router='domains': there are 4 copies of an FFN and 2 domains in the sample"
    " (zh, en); expected as many, or 'clusters'",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case):
  options, sample, message = REFUSED[case]
  moe = MoeConfig(num_experts=4, top_k=2)
  with pytest.raises(errors.UserError) as caught:
    _calibrate(_target(moe), ScaleOut(source="", **options), sample=sample)
  assert str(caught.value) == message
