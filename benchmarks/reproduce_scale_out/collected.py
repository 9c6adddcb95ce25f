"""The numbers of a run: read from its workdir, whatever of it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from aquila_jax.core.experiment_config import ExperimentConfig, Load
from aquila_jax.pipeline import budget, records
from aquila_jax.pipeline.stage import is_done
from aquila_jax.planning import counting
from aquila_jax.training.metrics import read_rows
from benchmarks.reproduce_scale_out import experts

Record = dict[str, Any]


def collect(
  experiment: ExperimentConfig, directories: Mapping[int, epath.Path]
) -> Record:
  """What the seeds have so far.

  Args:
    experiment: of all seeds.
    directories: of each seed.

  Returns:
    The sizes of all arms, and by seed the losses of every stage that is done,
    and the rows of experts.jsonl.
  """
  models = {name: _size(experiment, name) for name in experiment.stages}
  seeds = {}
  for seed, directory in directories.items():
    done = {
      name: directory / "stages" / name
      for name in experiment.pipeline
      if is_done(directory / "stages" / name)
    }
    if done:
      seeds[str(seed)] = {
        "stages": {
          name: _stage(experiment, name, done, models[name]["step_flops"])
          for name in done
        },
        "experts": experts.read(directory / "experts.jsonl"),
      }
  return {
    "arms": list(experiment.pipeline[1:]),
    "models": models,
    "seeds": seeds,
  }


def _size(experiment: ExperimentConfig, name: str) -> Record:
  stage = experiment.stages[name]
  model, train = stage.model, stage.train
  total, moe = counting.count(model).total, model.moe
  steps = budget.total_steps(experiment, name)
  return {
    "layers": model.num_layers,
    "width": model.embed_dim,
    "experts": moe.num_experts if moe else 0,
    "top_k": moe.top_k if moe else 0,
    "FFN": model.mlp_dim,
    "shared": moe.shared_expert_dim if moe else 0,
    "parameters": total.parameters,
    "active": total.active,
    "learning_rate": train.optimizer.learning_rate,
    "warmup_steps": train.optimizer.warmup_steps,
    "steps": steps,
    "tokens": steps * train.tokens_per_step,
    "flops": steps * budget.step_flops(stage),
    "step_flops": budget.step_flops(stage),
  }


def _stage(
  experiment: ExperimentConfig,
  name: str,
  done: Mapping[str, epath.Path],
  step_flops: float,
) -> Record:
  """The losses of a stage: right after its start, along the way, and last."""
  directory = done[name]
  result = records.read(directory / "result.json") or {}
  evaluation = records.read(directory / "evaluation.json") or {}
  rows = read_rows(directory / "validation.jsonl")
  start = _start(experiment, name, done)
  curve = [] if start is None else [[0.0, start]]
  curve += [[row["step"] * step_flops, row["loss"]] for row in rows]
  scores = evaluation.get("scores")
  return {
    "start": start,
    "curve": curve,  # FLOPs of the stage and loss
    "validation": _by_language(rows[-1]),
    "test": None if scores is None else _test(scores),
    "wall_s": result["wall_s"],
    "agreement": _agreement(directory / "routing.jsonl"),
  }


def _start(
  experiment: ExperimentConfig, name: str, done: Mapping[str, epath.Path]
) -> float | None:
  """The validation loss before the first step; None from scratch.

  A stage that loads another starts with that one's last, on the same text.
  """
  init = experiment.stages[name].init
  if isinstance(init, Load) and init.path in done:
    return read_rows(done[init.path] / "validation.jsonl")[-1]["loss"]
  opening = records.read(done[name] / "stage.json") or {}
  return opening["transform_losses"].get(getattr(init, "method", ""))


def _by_language(row: Record) -> dict[str, float]:
  """The losses of a row of validation.jsonl: `overall`, and of languages."""
  named = {
    key.removeprefix("loss_"): value
    for key, value in row.items()
    if key.startswith("loss_")
  }
  return {"overall": row["loss"], **named}


def _test(scores: Record) -> dict[str, float]:
  named = {name: s["loss"] for name, s in scores["languages"].items()}
  return {"overall": scores["overall"]["loss"], **named}


def _agreement(path: epath.Path) -> Record | None:
  """Of the last of the longest spans between checkpoints in routing.jsonl.

  The very last span is what is left of the training, and differs.
  """
  rows = read_rows(path) if path.exists() else []
  if not rows:
    return None
  spans = [row["step"] - row["since_step"] for row in rows]
  full = [row for row, s in zip(rows, spans, strict=True) if s == max(spans)]
  last = full[-1]
  layers = [share for share in last["agreement"] if share is not None]
  return {
    "share": sum(layers) / len(layers),
    "step": last["step"],
    "since_step": last["since_step"],
  }
