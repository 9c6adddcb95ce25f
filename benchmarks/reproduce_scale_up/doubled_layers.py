"""Which layer of the source can be run twice: the loss after each choice.

  python -m benchmarks.reproduce_scale_up.doubled_layers \
    --workdir=runs/reproduce_scale_up --output=FILE.json

Looks into why stacking lies below interpolation: of the sources that
`make reproduce-scale-up` has trained, one layer at a time is doubled where it
stands, and some pairs are, by the same growth and on the same validation text.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from typing import Any

from absl import flags
from etils import epath

from aquila_jax.cli import app, config_door
from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.model_dir import StoredModel, load_model
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.context import Context, make_context
from benchmarks.reproduction.job import Job

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Of the reproduction.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")

_CONFIG = "experiments/configs/reproduce_scale_up.py"
# What is looked at -> the layers of the source, from the bottom up.
_CASES: dict[str, tuple[int, ...]] = {
  **{f"layer {i} doubled": tuple(sorted((*range(6), i))) for i in range(6)},
  "interpolation: 0 and 3": (0, 0, 1, 2, 3, 3, 4, 5),
  "1 and 3": (0, 1, 1, 2, 3, 3, 4, 5),
  "1 and 4": (0, 1, 1, 2, 3, 4, 4, 5),
  "2 and 5": (0, 1, 2, 2, 3, 4, 5, 5),
  "stacking: 0 and 1 on top": (0, 1, 2, 3, 4, 5, 0, 1),
  "0 on top": (0, 1, 2, 3, 4, 5, 0),
  "1 on top": (0, 1, 2, 3, 4, 5, 1),
  "bert2BERT's: 4 and 5 on top": (0, 1, 2, 3, 4, 5, 4, 5),
}


def _loss(context: Context, model: StoredModel) -> float:
  train = context.experiment.stages["fpi"].train
  evaluate = context.evaluator(
    model.config,
    split="validation",
    sequence_length=train.sequence_length,
    max_tokens=train.evaluate_tokens,
  )
  return evaluate(model.params)["loss"]


def _source(job: Job, seed: int) -> epath.Path:
  return job.directory(seed) / "stages" / "source" / "model"


def _rises(job: Job, seed: int) -> dict[str, float]:
  """By case, how far the loss is above the source's."""
  context = make_context(job.of_seed(seed), job.directory(seed), say=job.say)
  source = load_model(
    str(_source(job, seed)),
    like=decoder_lm.abstract_params,
    with_optimizer=False,
  )
  before = _loss(context, source)
  found = {}
  for name, layers in _CASES.items():
    options = ScaleUp(
      source="source", method="fpi", layers=layers, optimizer="reset"
    )
    target = dataclasses.replace(source.config, num_layers=len(layers))
    found[name] = _loss(context, scale_up(source, target, options)) - before
  return found


def main() -> None:
  """Measures, prints the table and writes the JSON."""
  workdir = epath.Path(_WORKDIR.value)
  job = Job(
    experiment=config_door.load_file(_CONFIG),
    workdir=workdir,
    seeds=(0, 1, 2),
    output=pathlib.Path(workdir / "layers.json"),
    page=pathlib.Path(workdir / "layers.md"),
  )
  seeds: dict[str, Any] = {
    str(seed): _rises(job, seed)
    for seed in job.seeds
    if _source(job, seed).exists()
  }
  for name in _CASES:
    rises = [found[name] for found in seeds.values()]
    each = "  ".join(f"{rise:+.3f}" for rise in rises)
    print(f"{name:<28}{statistics.fmean(rises):+.3f}   {each}")
  if _OUTPUT.value:
    report = {
      "what": "nats above the loss of the source, validation split",
      "seeds": seeds,
    }
    text = json.dumps(report, indent=1) + "\n"
    pathlib.Path(_OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
