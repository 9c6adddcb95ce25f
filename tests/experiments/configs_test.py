"""Every shipped config: valid, unchanged, and of the size that it claims."""

from __future__ import annotations

import pytest

from aquila_jax.core.experiment_config import (
  ExperimentConfig,
  ScaleOut,
  ScaleUp,
  StageConfig,
)
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth import scale_out, scale_up
from aquila_jax.planning import counting
from tests.golden import resolved

PAPER = {
  # name: parameters, active parameters, tokens trained, tokens a step
  "aquila_1_8b": ("1.8B", "1.8B", 3.6e12, 12e6),
  "aquila_8x1_8b": ("7.5B", "2.6B", 400e9, 12e6),
  "aquila_7b": ("8.2B", "8.2B", 3.6e12, 12e6),
  "aquila_16b": ("16.7B", "16.7B", 1.2e12, 12e6),
  "aquila_8x16b": ("104.7B", "29.2B", 545e9, 24e6),
}
# Models that a config starts from and no config trains: SmolLM2-135M, of its
# GGUF file.
IMPORTED = {
  "smollm2": ModelConfig(
    vocab_size=49152,
    num_layers=30,
    embed_dim=576,
    mlp_dim=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    context_length=8192,
    rope_theta=1e5,
    norm_epsilon=1e-5,
    qkv_bias=False,
    tied_embeddings=True,
    compute_dtype="float32",
  )
}


@pytest.mark.parametrize("name", resolved.names())
def test_resolved_config_is_the_golden_one(name):
  path = resolved.GOLDEN / f"{name}.txt"
  golden = path.read_text(encoding="utf-8") if path.exists() else ""
  lines, expected = resolved.text(name).splitlines(), golden.splitlines()
  changed = [f"- {line}" for line in expected if line not in lines]
  changed += [f"+ {line}" for line in lines if line not in expected]
  assert lines == expected, (
    f"{name}.py no longer resolves to {path.relative_to(resolved.ROOT)}:\n"
    + "\n".join(changed)
    + "\nIf that is meant: python -m tests.golden.update"
  )


def test_there_is_a_golden_file_for_every_config_and_no_other():
  golden = sorted(path.stem for path in resolved.GOLDEN.glob("*.txt"))
  assert golden == resolved.names()


@pytest.mark.parametrize("name", PAPER)
def test_paper_config_has_the_papers_size_and_tokens(name):
  parameters, active, tokens, tokens_per_step = PAPER[name]
  stage = resolved.experiment(name).stage("")
  total = counting.count(stage.model).total
  assert counting.in_words(total.parameters) == parameters
  assert counting.in_words(total.active) == active
  # The paper rounds: its 12M may be 12e6 or 12 * 2^20, 5% more.
  assert 1 <= stage.train.tokens_per_step / tokens_per_step < 1.05
  trained = stage.train.steps * stage.train.tokens_per_step
  assert 0 <= tokens - trained < stage.train.tokens_per_step


@pytest.mark.parametrize("name", resolved.names())
def test_growth_keeps_head_width_key_value_heads_and_vocabulary(name):
  for stage, source in _growths(resolved.experiment(name)):
    model, groups = stage.model, source.num_kv_heads
    assert model.head_dim == source.head_dim
    if getattr(stage.init, "method", "") == "fpi":  # exact for whole groups
      assert model.num_kv_heads % groups == 0
    else:
      assert model.num_kv_heads == groups
    assert model.vocab_size == source.vocab_size
    assert model.tied_embeddings == source.tied_embeddings


@pytest.mark.parametrize("name", resolved.names())
def test_every_growth_fits_its_source(name):
  for stage, source in _growths(resolved.experiment(name)):
    if isinstance(stage.init, ScaleUp):
      scale_up.check_pair(source, stage.model, stage.init, path="model")
    elif isinstance(stage.init, ScaleOut):
      scale_out.plan_scale_out(source, stage.model, stage.init, path="model")


@pytest.mark.parametrize("name", resolved.names())
def test_every_source_stage_stands_before_its_growth(name):
  experiment = resolved.experiment(name)
  for i, stage_name in enumerate(experiment.pipeline):
    init = experiment.stages[stage_name].init
    if isinstance(init, ScaleUp | ScaleOut) and init.source in (
      experiment.stages
    ):
      assert init.source in experiment.pipeline[:i]


@pytest.mark.parametrize(
  ("name", "flops"),
  # 420 s at 30 GFLOP/s, 3,600 s at 50; smoke: a second of computing.
  [("quickstart", 1.26e13), ("bilingual_base", 1.8e14), ("smoke", 5e10)],
)
def test_pipeline_takes_the_flops_it_was_sized_for(name, flops):
  experiment = resolved.experiment(name)
  spent: dict[str, float] = {}
  for stage_name in experiment.pipeline:
    stage = experiment.stages[stage_name]
    train = stage.train
    source = train.match_flops or getattr(stage.init, "source", "")
    own = train.steps * train.tokens_per_step
    own *= counting.train_flops_per_token(stage.model, train.sequence_length)
    # The control spends what its model took with all its ancestors.
    spent[stage_name] = own + spent.get(source, 0.0)
  pipeline_flops = spent["scale_out"] + spent["control"]
  assert flops / 1.2 < pipeline_flops < 1.2 * flops


def _growths(
  experiment: ExperimentConfig,
) -> list[tuple[StageConfig, ModelConfig]]:
  """(stage, source model) of every growth, in this config or between two."""
  pairs = []
  for stage in experiment.stages.values():
    if isinstance(stage.init, ScaleUp | ScaleOut):
      source = stage.init.source
      if source in experiment.stages:
        source_model = experiment.stages[source].model
      else:  # runs/NAME/...
        parent = source.split("/")[1]
        source_model = (
          IMPORTED[parent]
          if parent in IMPORTED
          else resolved.experiment(parent).stage("").model
        )
      pairs.append((stage, source_model))
  return pairs
