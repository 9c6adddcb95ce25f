"""Steps of the control, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from aquila_jax.core import errors
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_dir import StoredModel, save_model
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import budget
from aquila_jax.pipeline.learned_growth import operator_training, planned_flops
from aquila_jax.planning import counting
from tests.growth import tiny


def test_the_control_gets_what_the_three_stages_took(kit):
  experiment = kit.experiment()
  stages = experiment.stages
  spent = sum(
    4 * budget.step_flops(stages[name])
    for name in ("dense", "scale_up", "scale_out")
  )
  steps = budget.total_steps(experiment, "control")
  a_step = budget.step_flops(stages["control"])
  assert abs(steps * a_step - spent) <= a_step / 2
  assert steps == 8


def test_flops_of_a_step_by_hand(kit):
  # Tokens * 3 * (2 * weights that a token meets + 4 L N H T); the head is tied.
  attention = 16 * 2 * 8 + 2 * 16 * 8 + 2 * 8 * 16
  weights = 2 * (attention + 3 * 16 * 24) + 16 * 320
  a_token = 3 * (2 * weights + 4 * 2 * 2 * 8 * 32)
  stage = kit.experiment().stages["dense"]
  assert budget.step_flops(stage) == 8 * 32 * a_token


def test_the_pass_for_the_load_counts_too(kit):
  changes: dict[str, Any] = dict(stages__control__train__num_microbatches=2)
  found = {
    over: budget.token_flops(
      kit.experiment(
        stages__control__train__loss=dict(balance_over=over), **changes
      ).stages["control"]
    )
    for over in ("global", "running")
  }
  model = kit.experiment().stages["control"].model
  parts = counting.count(model, sequence_length=32).parts
  forward = sum(part.forward_flops for part in parts.values())
  head = parts["lm_head"].forward_flops
  assert found == {"global": 4 * forward - head, "running": 3 * forward}


def test_what_a_learned_growth_takes_counts_too(kit):
  plain = kit.experiment()
  learned = kit.experiment(
    stages__scale_up__init__method="ligo",
    stages__scale_up__init__optimizer="reset",
    stages__scale_up__init__ligo=dict(steps=9),
  )
  stages = learned.stages
  took = planned_flops(
    stages["dense"].model,
    stages["scale_up"].model,
    operator_training(stages["scale_up"].init.ligo, stages["scale_up"].train),
  )
  a_step = budget.step_flops(stages["control"])
  assert took > 2 * a_step
  more = budget.total_steps(learned, "control") - budget.total_steps(
    plain, "control"
  )
  assert abs(more * a_step - took) <= a_step


def test_steps_as_given(kit):
  assert budget.total_steps(kit.experiment(), "scale_out") == 4


def test_the_flops_of_a_model_on_disk_count_too(kit, tmp_path):
  trained = Event(kind="train", steps=5, tokens=10, flops=1e9)
  config = tiny.replace(
    tiny.SOURCE, param_dtype="float32", compute_dtype="float32"
  )
  stored = StoredModel(
    config=config,
    lineage=Lineage(events=(trained,)),
    params=tiny.params(config),
    tokenizer="{}",
  )
  path = tmp_path / "model"
  save_model(path, stored, axes=decoder_lm.parameter_axes(config))
  alone = kit.experiment(
    stages__scale_out__init__source=str(path),
    pipeline=("scale_out", "control"),
  )
  a_step = budget.step_flops(alone.stages["control"])
  own = 4 * budget.step_flops(alone.stages["scale_out"])
  expected = round((own + 1e9) / a_step)
  assert budget.total_steps(alone, "control") == expected
  assert expected > 4


def test_a_step_that_takes_more_than_everything_is_refused(kit):
  experiment = kit.experiment(
    stages__control__train__match_flops="dense",
    stages__dense__train__steps=1,
    stages__control__train__batch_size=256,
  )
  with pytest.raises(errors.UserError) as caught:
    budget.total_steps(experiment, "control")
  dense = budget.step_flops(experiment.stages["dense"])
  control = budget.step_flops(experiment.stages["control"])
  assert str(caught.value) == (
    "config.stages.control.train.match_flops='dense': one step takes"
    f" {control:.3g} FLOPs, the stage and its ancestors took {dense:.3g};"
    " expected a smaller batch"
  )


@pytest.mark.parametrize(
  ("stage", "parent"),
  [("dense", ""), ("scale_up", "dense"), ("control", "")],
)
def test_the_parent_of_a_stage(kit, stage, parent):
  assert budget.parent_stage(kit.experiment(), stage) == parent
