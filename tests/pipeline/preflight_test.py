"""What would stop a later stage is refused before the first."""

from __future__ import annotations

import json
import pathlib

import pytest

from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import GrowthMask
from aquila_jax.pipeline.preflight import (
  check_config,
  check_data,
  check_order,
)


def _check(kit, tmp_path, changes) -> None:
  """What a run checks before its first step."""
  experiment = kit.experiment(**changes)
  check_order(experiment)
  check_config(experiment, stages=experiment.pipeline)
  check_data(kit.context(tmp_path, **changes), stages=experiment.pipeline)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      dict(pipeline=("scale_up", "dense", "scale_out", "control")),
      "config.stages.scale_up.init.source='dense': expected a stage that stands"
      " before it in pipeline=('scale_up', 'dense', 'scale_out', 'control')",
    ),
    (
      dict(stages__scale_up__model__embed_dim=8),
      "config.stages.scale_up.model.embed_dim=8: expected at least 16; Scale-Up"
      " does not shrink",
    ),
    (
      dict(stages__scale_out__model__mlp_dim=32),
      "config.stages.scale_out.model.mlp_dim=32: expected a divisor of 24, the"
      " hidden units that the routed experts share out; the nearest is 24",
    ),
    (
      dict(stages__control__model__vocab_size=256),
      "config.stages.control.model.vocab_size=256: expected at least 300, the"
      " tokens of the data's tokenizer",
    ),
    (
      dict(stages__scale_out__train__batch_size=12),
      "config.stages.scale_out.train.batch_size=12: expected a multiple of 8, 1"
      " microbatches spread over 8 devices; the nearest is 16",
    ),
    (
      dict(stages__scale_out__train__optimizer__warmup_steps=9),
      "config.stages.scale_out.train.optimizer.warmup_steps=9: expected at most"
      " the steps of the stage, 4",
    ),
    (
      dict(stages__control__train__freeze__new_only=True),
      "config.stages.control.train.freeze.new_only=True: expected a model that"
      " was grown; its lineage has no scale_up",
    ),
    (
      dict(stages__control__train__optimizer__growth_lr="function_space"),
      "config.stages.control.train.optimizer.growth_lr='function_space':"
      " expected a model that was grown by copying; its lineage has no"
      " scale_up, or the last one has no copies (method='random', or an earlier"
      " version of this package)",
    ),
    (
      dict(
        stages__scale_out__train__optimizer__warmup_steps=13,
        stages__scale_out__train__optimizer__continuation="keep",
      ),
      "config.stages.scale_out.train.optimizer.warmup_steps=13: expected at"
      " most the steps of the stage and the 8 before it, 12",
    ),
    (
      dict(stages__scale_out__train__mask_steps=3),
      "config.stages.scale_out.train.mask_steps=3: expected 0; the model that"
      " the stage starts from has no growth_mask that could rise",
    ),
    (
      dict(evaluation__prompts=("the " * 60,)),
      f"prompt='{'the ' * 9}t...': has 62 tokens; expected fewer than the"
      " model's context_length=32",
    ),
    (
      dict(
        stages__scale_up__model__num_kv_heads=2,
        stages__scale_up__init__method="fpi",
        stages__scale_up__init__compare=("aki_pro",),
      ),
      "config.stages.scale_up.model.num_kv_heads=2: expected the source's 1;"
      " method='aki_pro' keeps the key/value groups and grows query heads"
      " inside them, method='aki' or 'fpi' can add groups",
    ),
    (
      dict(stages__scale_up__init__source="nowhere"),
      "config.stages.scale_up.init.source='nowhere': there is no such"
      " directory",
    ),
  ],
)
def test_refused_by_name(kit, tmp_path, changes, message):
  with pytest.raises(errors.UserError) as caught:
    _check(kit, tmp_path, changes)
  assert str(caught.value) == message


@pytest.mark.parametrize("stage", ["scale_up", "scale_out"])
def test_what_needs_growth_is_accepted_where_an_ancestor_was_grown(
  kit, tmp_path, stage
):
  changes = {
    f"stages__{stage}__train__freeze__new_only": True,
    f"stages__{stage}__train__optimizer__growth_lr": "function_space",
  }
  _check(kit, tmp_path, changes)


@pytest.mark.parametrize(
  ("continuation", "warmup_steps"), [("restart", 99), ("keep", 12)]
)
def test_a_warmup_that_is_not_of_the_stage_need_not_fit_into_it(
  kit, tmp_path, continuation, warmup_steps
):
  optimizer = "stages__scale_out__train__optimizer"
  changes = {
    f"{optimizer}__continuation": continuation,
    f"{optimizer}__warmup_steps": warmup_steps,
  }
  _check(kit, tmp_path, changes)


def test_what_needs_no_data_is_refused_before_there_are_any(kit, tmp_path):
  warmup = dict(stages__control__train__optimizer__warmup_steps=99)
  with pytest.raises(errors.UserError, match="warmup_steps=99: expected"):
    kit.run(tmp_path / "run", data__prepared="", **warmup)
  assert not (tmp_path / "run").exists()


def _masked_header(kit, folder: pathlib.Path) -> str:
  """A MODEL of the stage `dense` under a mask, without its arrays."""
  mask = GrowthMask(
    value=0.5, embed_dim=12, mlp_dim=24, num_kv_heads=1, queries_per_kv=2
  )
  model = config_lib.to_dict(kit.experiment().stages["dense"].model)
  model["growth_mask"] = config_lib.to_dict(mask)
  folder.mkdir()
  lineage = Lineage(events=(Event(kind="scratch", name="dense"),))
  header = dict(format=1, model=model, lineage=lineage.to_json())
  (folder / "config.json").write_text(json.dumps(header))
  return str(folder)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      dict(stages__dense__train__mask_steps=0),
      "config.stages.dense.train.mask_steps=0: expected at least 1",
    ),
    # 0.5 + 4 / 9 is not 1 when the next stage grows it.
    (
      dict(stages__dense__train__mask_steps=9),
      "the source's growth_mask is 0.944444: what a masked growth added does"
      " not count whole; train the source with mask_steps until its mask is 1",
    ),
    (
      dict(
        stages__dense__train__mask_steps=9,
        pipeline=("dense", "scale_out"),
        stages__scale_out__init__source="dense",
        stages__scale_out__model__num_layers=2,
        stages__scale_out__model__embed_dim=16,
        stages__scale_out__model__num_heads=2,
      ),
      "the source's growth_mask is 0.944444: ",
    ),
    (dict(stages__dense__train__mask_steps=8), None),
  ],
)
def test_a_growth_mask_is_followed_through_the_stages(
  kit, tmp_path, changes, message
):
  source = _masked_header(kit, tmp_path / "masked")
  experiment = kit.experiment(
    stages__dense__init=dict(kind="load", path=source), **changes
  )
  if message is None:
    check_config(experiment, stages=experiment.pipeline)
    return
  with pytest.raises(errors.UserError) as caught:
    check_config(experiment, stages=experiment.pipeline)
  assert str(caught.value).startswith(message)
