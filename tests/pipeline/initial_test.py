"""Where the weights come from, by each kind of init."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import LigoConfig, ScaleUp, Scratch
from aquila_jax.growth.scale_out import scale_out
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.initial import Start, with_method
from aquila_jax.pipeline.learned_growth import operator_training, planned_flops


def _start(kit, whole, name: str) -> Start:
  context = kit.context(whole.workdir)
  return Start(
    context=context,
    name=name,
    stage=context.experiment.stages[name],
    locate=lambda source: str(whole.workdir / "stages" / source / "model"),
  )


def _assert_same(a, b) -> None:
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_scratch_is_the_models_initialisation_by_the_stages_seed(kit, whole):
  start = _start(kit, whole, "control")
  model = start.model()
  seed = start.context.stage_seed("control")
  expected = jax.jit(
    lambda key: decoder_lm.init_params(start.stage.model, key=key)
  )(jax.random.key(seed))
  _assert_same(model.params, expected)
  assert start.source is None
  assert model.moments is None
  (event,) = model.lineage.events
  assert (event.kind, event.options) == ("scratch", {"seed": seed})


@pytest.mark.parametrize(
  ("name", "grow"), [("scale_up", scale_up), ("scale_out", scale_out)]
)
def test_a_growth_is_that_of_the_library(kit, whole, name, grow):
  start = _start(kit, whole, name)
  assert start.source is not None
  expected = grow(
    start.source,
    start.stage.model,
    start.stage.init,
    seed=start.context.stage_seed(name),
    name=name,
  )
  model = start.model()
  _assert_same(model.params, expected.params)
  _assert_same(model.moments, expected.moments)
  assert model.lineage == expected.lineage


def test_a_method_to_compare_with_changes_only_the_method(kit, whole):
  start = _start(kit, whole, "scale_up")
  assert start.source is not None
  other = start.model("fpi")
  assert isinstance(start.stage.init, ScaleUp)
  init = dataclasses.replace(start.stage.init, method="fpi")
  expected = scale_up(
    start.source, start.stage.model, init, seed=0, name="scale_up"
  )
  _assert_same(other.params, expected.params)
  assert other.moments is None


def test_aki_pro_to_compare_with_a_stack_interpolates():
  init = ScaleUp(source="dense", method="aki", depth="stack")
  other = with_method(init, "aki_pro")
  assert (other.method, other.depth) == ("aki_pro", None)
  assert with_method(init, "fpi").depth == "stack"


def test_a_learned_growth_takes_text_and_says_what_it_took(kit, whole):
  start = _start(kit, whole, "scale_up")
  assert start.source is not None
  assert isinstance(start.stage.init, ScaleUp)
  init = dataclasses.replace(
    start.stage.init,
    method="ligo",
    optimizer="reset",
    ligo=LigoConfig(steps=2),
  )
  stage = dataclasses.replace(start.stage, init=init)
  start = dataclasses.replace(start, stage=stage)
  model, source = start.model(), start.source
  assert source is not None
  event = model.lineage.events[-1]
  assert (event.kind, event.steps, event.tokens) == ("scale_up", 2, 2 * 8 * 32)
  assert event.flops == planned_flops(
    source.config, stage.model, operator_training(init.ligo, stage.train)
  )
  assert event.growth is not None
  assert (
    event.growth["reasons"][0] == "its maps are learned on the target's loss"
  )
  # Its batches come after those of the source, and the stage's after them.
  positions = [
    start.context.data_state(lineage, name="scale_up").rows
    for lineage in (source.lineage, model.lineage)
  ]
  assert positions[1] > positions[0] > 0
  assert model.config == stage.model
  jax.tree.map(
    lambda leaf, like: np.testing.assert_equal(leaf.shape, like.shape),
    model.params,
    decoder_lm.abstract_params(stage.model),
  )
  with pytest.raises(UserError) as caught:
    scale_up(source, stage.model, init)
  assert str(caught.value) == (
    "method='ligo': it is learned on text; expected a stage of a config, run by"
    " train or efficient_scale"
  )


def test_scratch_knows_no_source(kit, whole):
  assert isinstance(_start(kit, whole, "dense").stage.init, Scratch)
  assert _start(kit, whole, "dense").source is None
