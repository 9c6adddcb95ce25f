"""What is measured of a stage when it is done: scores, and a few samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etils import epath

from aquila_jax.core import processes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel, load_model
from aquila_jax.evaluation.results import Sample
from aquila_jax.evaluation.scores import Scores
from aquila_jax.generation.generate import generate, text_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import NOT_CAUSAL, is_causal
from aquila_jax.pipeline import records
from aquila_jax.pipeline.context import Context


def evaluate_stage(context: Context, name: str, directory: epath.Path) -> None:
  """Writes evaluation.json, unless it is there and still holds.

  Args:
    context: with the evaluation's config.
    name: of the stage.
    directory: of the stage; it has a MODEL.
  """
  asked = _asked(context)
  found = records.read(directory / "evaluation.json")
  if found is not None and found["asked"] == asked:
    return
  config = context.experiment.evaluation
  context.say(f"{name}: evaluating on the {config.split} split")
  # A process of several reads the parts of its own devices.
  several = processes.are_several()
  stored = _load(directory, context.spread if several else None)
  evaluator = context.evaluator(
    stored.config,
    split=config.split,
    sequence_length=context.experiment.stages[name].train.sequence_length,
    max_tokens=config.max_tokens,
  )
  scores = evaluator.scores(stored.params)
  sampling = Sampling(
    max_new_tokens=config.max_new_tokens,
    temperature=config.temperature,
    top_p=config.top_p,
    seed=context.experiment.seed,
  )
  prompts = config.prompts
  if prompts and not is_causal(stored.config):
    context.say(f"{name}: no samples; {NOT_CAUSAL}")
    prompts = ()

  def write() -> None:
    texts = []
    if prompts:
      whole = _load(directory) if several else stored
      texts = generate(text_model(whole), prompts, sampling=sampling)
    record = {
      "asked": asked,
      "scores": scores.to_json(),
      "samples": [
        {"prompt": prompt, "text": found.text}
        for prompt, found in zip(prompts, texts, strict=True)
      ],
    }
    records.write(directory / "evaluation.json", record)

  processes.by_first(write, name=f"samples of {name}")


def _load(
  directory: epath.Path, like: Callable[[ModelConfig], Any] | None = None
) -> StoredModel:
  return load_model(
    directory / "model",
    like=like or decoder_lm.abstract_params,
    with_optimizer=False,
  )


def read_evaluation(
  directory: epath.Path,
) -> tuple[Scores | None, list[Sample]]:
  """The scores and samples of a stage; None and nothing where there are none.

  Args:
    directory: of the stage.

  Returns:
    Scores and samples.
  """
  found = records.read_here(directory / "evaluation.json")
  if found is None:
    return None, []
  samples = [Sample(**sample) for sample in found["samples"]]
  return Scores.from_json(found["scores"]), samples


def _asked(context: Context) -> dict[str, Any]:
  """What an evaluation depends on beside the MODEL."""
  experiment = context.experiment
  return {
    "evaluation": records.plain(experiment.evaluation),
    "data": context.data.digest,
    "seed": experiment.seed,
  }
