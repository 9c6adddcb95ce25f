"""What an experiment refuses, and how a stage is found in it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from aquila_jax.core import experiment_config as ec
from aquila_jax.core.errors import UserError
from aquila_jax.core.model_config import GrowthMask, ModelConfig, MoeConfig

MODEL = ModelConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=8,
  mlp_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  context_length=64,
)
OPTIMIZER = ec.OptimizerConfig(learning_rate=1e-3)
TRAIN = ec.TrainConfig(
  steps=5, batch_size=8, sequence_length=16, optimizer=OPTIMIZER
)
STAGE = ec.StageConfig(model=MODEL, train=TRAIN)
DATA = ec.DataConfig(sources={"a": ec.SourceConfig(path="a", language="en")})


def _experiment(**fields) -> ec.ExperimentConfig:
  defaults: dict[str, Any] = dict(
    name="x",
    data=DATA,
    stages={"dense": STAGE, "grown": STAGE},
    pipeline=("dense", "grown"),
  )
  return ec.ExperimentConfig(**(defaults | fields))


REFUSED = [
  (
    ec.DataConfig,
    {"sources": DATA.sources, "seed": -1},
    f"seed=-1: need 0 <= seed <= {2**63 - 1}",
  ),
  (
    _experiment,
    {"seed": 2**63},
    f"seed={2**63}: need 0 <= seed <= {2**63 - 1}",
  ),
  (
    ec.ScaleUp,
    {"source": "a", "depth": "stack"},
    "depth='stack': method='aki_pro' is AKI with depth='interpolate'; use"
    " method='aki' for another depth rule",
  ),
  (ec.LigoConfig, {"steps": 0}, "steps=0: need >= 1"),
  (ec.LigoConfig, {"learning_rate": 0.0}, "learning_rate=0.0: need > 0"),
  (ec.LigoConfig, {"noise": 1.5}, "noise=1.5: need 0 <= noise <= 1"),
  (ec.LigoConfig, {"batch_size": -1}, "batch_size=-1: need >= 0"),
  (ec.LigoConfig, {"sequence_length": -1}, "sequence_length=-1: need >= 0"),
  (
    ec.StageConfig,
    {
      "model": MODEL,
      "train": TRAIN,
      "init": ec.ScaleUp(source="a", ligo=ec.LigoConfig(sequence_length=65)),
    },
    "init.ligo.sequence_length=65 exceeds model.context_length=64",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 0.0},
    "learning_rate=0.0: need > 0",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 1.0, "warmup_steps": -1},
    "warmup_steps=-1: need >= 0",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 1.0, "final_ratio": 1.5},
    "final_ratio=1.5: need 0 <= final_ratio <= 1",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 1.0, "ema_decay": 1.0},
    "ema_decay=1.0: need 0 <= ema_decay < 1",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 1.0, "epsilon": 0.0},
    "epsilon=0.0: need > 0",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 1.0, "weight_decay": -0.1},
    "weight_decay=-0.1: need >= 0",
  ),
  (
    ec.OptimizerConfig,
    {"learning_rate": 1.0, "clip_norm": 0.0},
    "clip_norm=0.0: need > 0, or None for no clipping",
  ),
  (
    ec.TrainConfig,
    {**vars(TRAIN), "mask_steps": -1},
    "mask_steps=-1: need >= 0",
  ),
  (ec.LossConfig, {"lm_z": -1.0}, "lm_z=-1.0: need >= 0"),
  (ec.LossConfig, {"bias_rate": -1.0}, "bias_rate=-1.0: need >= 0"),
  (ec.AdaptiveBalance, {"maximum": 0.0}, "maximum=0.0: need > 0"),
  (
    ec.AdaptiveBalance,
    {"smoothing": 1.0},
    "smoothing=1.0: need 0 <= smoothing < 1",
  ),
  (ec.CheckpointConfig, {"every_steps": 0}, "every_steps=0: need >= 1"),
  (
    ec.CheckpointConfig,
    {"every_seconds": -1.0},
    "every_seconds=-1.0: need >= 0",
  ),
  (ec.CheckpointConfig, {"keep_last": 0}, "keep_last=0: need >= 1"),
  (ec.CheckpointConfig, {"keep_best": -1}, "keep_best=-1: need >= 0"),
  (
    ec.SourceConfig,
    {"path": "a", "language": "en", "weight": 0.0},
    "weight=0.0: need > 0",
  ),
  (
    ec.SourceConfig,
    {"path": "", "language": "en"},
    "path='': name a corpus, a file or a folder",
  ),
  (
    ec.SourceConfig,
    {"path": "a", "language": "en", "max_bytes": -1},
    "max_bytes=-1: need >= 0",
  ),
  (
    ec.TokenizerConfig,
    {"vocab_size": 256},
    "vocab_size=256: need >= 257, the bytes and end_of_text",
  ),
  (
    ec.CleaningConfig,
    {"min_characters": -1},
    "min_characters=-1: need >= 0",
  ),
  (
    ec.CleaningConfig,
    {"near_duplicate_threshold": 0.0},
    "near_duplicate_threshold=0.0: need 0 < threshold <= 1",
  ),
  (ec.DataConfig, {"sources": {}}, "sources={}: give at least one source"),
  (
    ec.DataConfig,
    {"sources": DATA.sources, "test_share": 0.5},
    "test_share=0.5: need 0 < test_share < 0.5",
  ),
  (
    ec.MeshConfig,
    {"data": -1, "fsdp": -1},
    "data=-1 and fsdp=-1: at most one axis can have the devices that are left",
  ),
  (
    ec.MeshConfig,
    {"tensor": 0},
    "tensor=0: need >= 1, or -1 for the devices that are left",
  ),
  (
    ec.MeshConfig,
    {"expert": -2},
    "expert=-2: need >= 1, or -1 for the devices that are left",
  ),
  (ec.EvaluationConfig, {"max_tokens": -1}, "max_tokens=-1: need >= 0"),
  (ec.EvaluationConfig, {"batch_size": 0}, "batch_size=0: need >= 1"),
  (
    ec.EvaluationConfig,
    {"max_new_tokens": 0},
    "max_new_tokens=0: need >= 1",
  ),
  (
    ec.EvaluationConfig,
    {"temperature": -0.1},
    "temperature=-0.1: need >= 0",
  ),
  (ec.EvaluationConfig, {"top_p": 0.0}, "top_p=0.0: need 0 < top_p <= 1"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), REFUSED)
def test_values_are_refused(cls, fields, message):
  with pytest.raises(ValueError) as error:
    cls(**fields)
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"match_flops": "dense"},
      "steps=5 and match_flops='dense': give exactly one, a positive number of"
      " steps or the name of a stage",
    ),
    (
      {"steps": 0},
      "steps=0 and match_flops='': give exactly one, a positive number of"
      " steps or the name of a stage",
    ),
    ({"batch_size": 0}, "batch_size=0: need >= 1"),
    ({"log_every": 0}, "log_every=0: need >= 1"),
    ({"evaluate_every": -1}, "evaluate_every=-1: need >= 0"),
    ({"evaluate_tokens": 0}, "evaluate_tokens=0: need >= 1"),
    ({"watchdog_s": -1.0}, "watchdog_s=-1.0: need >= 0"),
    (
      {"num_microbatches": 3},
      "batch_size=8 is not a multiple of num_microbatches=3",
    ),
  ],
)
def test_training_is_refused(fields, message):
  with pytest.raises(ValueError) as error:
    dataclasses.replace(TRAIN, **fields)
  assert str(error.value) == message


def test_rows_longer_than_the_context_are_refused():
  with pytest.raises(ValueError) as error:
    ec.StageConfig(
      model=MODEL, train=dataclasses.replace(TRAIN, sequence_length=65)
    )
  assert str(error.value) == (
    "train.sequence_length=65 exceeds model.context_length=64"
  )


def test_a_growth_mask_is_not_written_into_a_stage():
  mask = GrowthMask(embed_dim=1, mlp_dim=1, num_kv_heads=1, queries_per_kv=1)
  with pytest.raises(ValueError) as error:
    ec.StageConfig(
      model=dataclasses.replace(MODEL, growth_mask=mask), train=TRAIN
    )
  assert str(error.value) == (
    "model.growth_mask: expected None; it is not set but comes from the model"
    " that the stage starts from"
  )


def test_scale_out_into_a_dense_model_is_refused():
  with pytest.raises(ValueError) as error:
    ec.StageConfig(init=ec.ScaleOut(source="a"), model=MODEL, train=TRAIN)
  assert str(error.value) == (
    "model.moe=None: init.kind='scale_out' fills experts; give model.moe"
  )


@pytest.mark.parametrize(
  ("fields", "loss", "has_pass"),
  [
    ({}, {}, True),
    ({"num_microbatches": 1}, {}, False),
    ({}, {"balance_over": "running"}, False),
    ({}, {"balance": 0.0}, False),
    ({}, {"balance": 0.0, "adaptive_balance": ec.AdaptiveBalance()}, True),
  ],
)
def test_the_load_is_read_first_where_a_global_balance_needs_it(
  fields, loss, has_pass
):
  train = dataclasses.replace(
    TRAIN, **({"num_microbatches": 2} | fields), loss=ec.LossConfig(**loss)
  )
  mixture = dataclasses.replace(MODEL, moe=MoeConfig())
  assert train.has_load_pass(mixture) == has_pass
  assert not train.has_load_pass(MODEL)


def test_tokens_a_step():
  assert TRAIN.tokens_per_step == 8 * 16


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"pipeline": ()}, "pipeline=(): name at least one stage"),
    (
      {"pipeline": ("dense", "dense")},
      "pipeline=('dense', 'dense'): a stage stands twice",
    ),
  ],
)
def test_pipeline_is_refused(fields, message):
  with pytest.raises(ValueError) as error:
    _experiment(**fields)
  assert str(error.value) == message


def test_unknown_stage_of_the_pipeline_is_named():
  with pytest.raises(UserError) as error:
    _experiment(pipeline=("dense", "grwon"))
  assert str(error.value) == (
    "config.pipeline[1]='grwon' is unknown; did you mean 'grown'?"
  )


def test_matched_stage_must_stand_before():
  matching = dataclasses.replace(
    STAGE, train=dataclasses.replace(TRAIN, steps=0, match_flops="grown")
  )
  stages = {"dense": matching, "grown": STAGE}
  assert _experiment(stages=stages, pipeline=("grown", "dense"))
  with pytest.raises(UserError) as error:
    _experiment(stages=stages)
  assert str(error.value) == (
    "config.stages.dense.train.match_flops='grown': expected a stage that"
    " stands before it in pipeline=('dense', 'grown')"
  )


def test_stage_by_name():
  experiment = _experiment()
  assert experiment.stage("grown") is experiment.stages["grown"]
  assert _experiment(pipeline=("grown",)).stage("") is STAGE
  with pytest.raises(UserError) as error:
    experiment.stage("dens")
  assert str(error.value) == (
    "--stage='dens' is unknown; did you mean 'dense'?"
  )
  with pytest.raises(UserError) as error:
    experiment.stage("")
  assert str(error.value) == (
    "the config has 2 stages; choose one with --stage=dense|grown"
  )
