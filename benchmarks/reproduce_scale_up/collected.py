"""The numbers of a run: read from its workdir, whatever of it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from aquila_jax.core.experiment_config import ExperimentConfig, LigoConfig
from aquila_jax.pipeline import records
from aquila_jax.pipeline.stage import is_done
from aquila_jax.planning import counting
from aquila_jax.training.metrics import read_rows
from benchmarks.reproduce_scale_up import initial


def collect(
  experiment: ExperimentConfig, directories: Mapping[int, epath.Path]
) -> dict[str, Any]:
  """What the seeds have so far.

  Args:
    experiment: of all seeds.
    directories: of each seed.

  Returns:
    The sizes of the models, and by seed the source, the rows of initial
    losses, and the validation curve of every arm that is done.
  """
  arm = experiment.stages[experiment.pipeline[1]]
  seeds = {}
  for seed, directory in directories.items():
    done = {
      name: directory / "stages" / name
      for name in experiment.stages
      if is_done(directory / "stages" / name)
    }
    if done:
      seeds[str(seed)] = {
        "initial": initial.read(directory / "initial.jsonl"),
        "stages": {n: _stage(experiment, n, d) for n, d in done.items()},
      }
  return {
    "arms": list(experiment.pipeline[1:]),
    "ligo_steps": getattr(arm.init, "ligo", LigoConfig()).steps,
    "models": {
      name: _size(experiment, name) for name in experiment.pipeline[:2]
    },
    "seeds": seeds,
  }


def _size(experiment: ExperimentConfig, name: str) -> dict[str, Any]:
  stage = experiment.stages[name]
  model, train = stage.model, stage.train
  return {
    "layers": model.num_layers,
    "width": model.embed_dim,
    "FFN": model.mlp_dim,
    "heads": model.num_heads,
    "groups": model.num_kv_heads,
    "parameters": counting.count(model).total.parameters,
    "learning_rate": train.optimizer.learning_rate,
    "steps": train.steps,
    "tokens": train.steps * train.tokens_per_step,
    "flops_per_token": counting.train_flops_per_token(
      model, train.sequence_length
    ),
  }


def _stage(
  experiment: ExperimentConfig, name: str, directory: epath.Path
) -> dict[str, Any]:
  """The validation losses of a stage, that before its first step in front."""
  stage = experiment.stages[name]
  opening = records.read(directory / "stage.json") or {}
  result = records.read(directory / "result.json") or {}
  losses = opening["transform_losses"]
  method = getattr(stage.init, "method", "")
  curve = [[0, losses[method]]] if method in losses else []
  for row in read_rows(directory / "validation.jsonl"):
    curve.append([row["step"] * stage.train.tokens_per_step, row["loss"]])
  return {
    "learning_rate": stage.train.optimizer.learning_rate,
    "curve": curve,  # tokens and loss
    "wall_s": result["wall_s"],
  }
