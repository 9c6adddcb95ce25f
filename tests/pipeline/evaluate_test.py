"""Scores and samples of a stage: the library's, and made again if asked."""

from __future__ import annotations

import dataclasses
import json

from etils import epath

from aquila_jax.core.model_dir import load_model, save_model
from aquila_jax.evaluation import perplexity
from aquila_jax.generation.generate import generate, text_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import stage as stage_lib
from aquila_jax.pipeline.evaluate import evaluate_stage, read_evaluation
from aquila_jax.pipeline.initial import Start


def _folder(whole, tmp_path) -> epath.Path:
  """A stage that has a MODEL and nothing else."""
  (tmp_path / "model").symlink_to(whole.workdir / "stages/dense/model")
  return epath.Path(tmp_path)


def test_scores_and_samples_are_those_of_the_library(kit, whole, tmp_path):
  folder = _folder(whole, tmp_path)
  context = kit.context(whole.workdir)
  evaluate_stage(context, "dense", folder)
  scores, samples = read_evaluation(folder)
  stored = load_model(folder / "model", like=decoder_lm.abstract_params)
  expected = perplexity.evaluate(
    stored.config,
    stored.params,
    data=context.data,
    split="test",
    sequence_length=32,
    batch_size=8,
    max_tokens=256,
  )
  assert scores is not None
  for language, score in expected.languages.items():
    found = scores.languages[language]
    assert (found.tokens, found.bytes) == (score.tokens, score.bytes)
    # Spread over 8 devices or on one: sums of float32 in another order.
    assert abs(found.nats / score.nats - 1) < 1e-6
  sampling = Sampling(max_new_tokens=4, temperature=0.8, top_p=0.95, seed=0)
  (text,) = generate(text_model(stored), ["the river"], sampling=sampling)
  assert [(s.prompt, s.text) for s in samples] == [("the river", text.text)]


def test_an_evaluation_is_made_once_for_one_question(kit, whole, tmp_path):
  folder = _folder(whole, tmp_path)
  messages: list[str] = []
  context = kit.context(whole.workdir, messages)
  said = ["dense: evaluating on the test split"]
  evaluate_stage(context, "dense", folder)
  assert messages == said
  evaluate_stage(context, "dense", folder)
  assert messages == said
  asked = dataclasses.replace(context.experiment.evaluation, prompts=())
  other = dataclasses.replace(
    context,
    experiment=dataclasses.replace(context.experiment, evaluation=asked),
  )
  evaluate_stage(other, "dense", folder)
  assert messages == 2 * said
  assert read_evaluation(folder)[1] == []


def test_experts_that_choose_are_measured_and_continue_nothing(
  kit, whole, tmp_path
):
  stored = load_model(
    whole.workdir / "stages/control/model", like=decoder_lm.abstract_params
  )
  assert stored.config.moe is not None
  moe = dataclasses.replace(
    stored.config.moe,
    choice="expert",
    router_order="softmax_then_topk",
    renormalise=False,
  )
  config = dataclasses.replace(stored.config, moe=moe)
  axes = decoder_lm.parameter_axes(config)
  stored = dataclasses.replace(stored, config=config)
  save_model(tmp_path / "model", stored, axes=axes)
  messages: list[str] = []
  context = kit.context(whole.workdir, messages)
  evaluate_stage(context, "control", epath.Path(tmp_path))
  scores, samples = read_evaluation(epath.Path(tmp_path))
  assert scores is not None and samples == []
  assert messages[-1] == (
    "control: no samples; model.moe.choice='expert' is not causal: experts"
    " choose among all tokens of a batch, later ones included"
  )

  stage = context.experiment.stages["control"]
  stage = dataclasses.replace(stage, model=config)
  start = Start(context=context, name="control", stage=stage, locate=str)
  lines = stage_lib._announcement(start, stored, {}, 4)
  assert lines[-1] == (
    "warning: model.moe.choice='expert' is not causal: experts choose among all"
    " tokens of a batch, later ones included; losses and scores know the future"
  )


def test_a_stage_without_an_evaluation_has_none(tmp_path):
  assert read_evaluation(epath.Path(tmp_path)) == (None, [])


def test_the_record_is_json_with_derived_numbers(whole):
  path = whole.workdir / "stages/control/evaluation.json"
  record = json.loads(path.read_text(encoding="utf-8"))
  english = record["scores"]["languages"]["en"]
  assert english["loss"] == english["nats"] / english["tokens"]
