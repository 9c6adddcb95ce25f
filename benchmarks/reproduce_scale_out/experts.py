"""How far the experts of an arm differ, and how even their load is.

Both at the start and at the end of its training. The start is made again: what
a Scale-Out draws follows from the seed and the stage's name.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from aquila_jax.core import files
from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import ExperimentConfig, ScaleOut
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel, load_model
from aquila_jax.growth.grown_tree import ArrayTree
from aquila_jax.growth.scale_out import plan_scale_out
from aquila_jax.growth.scale_up import model_leaves
from aquila_jax.growth.upcycling import Upcycling
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.context import Context, Say, make_context
from aquila_jax.pipeline.initial import Start
from aquila_jax.training.metrics import read_rows

Record = dict[str, Any]
Kernels = dict[str, Float[np.ndarray, "L E ..."]]


def measure(
  experiment: ExperimentConfig, directory: epath.Path, *, arm: str, say: Say
) -> None:
  """Adds two rows to experts.jsonl, of the start and of the end of an arm.

  Args:
    experiment: of the seed.
    directory: of the seed; the arm is done.
    arm: its name. Nothing is done of a dense one, or where the rows are there.
    say: takes a line for the person at the terminal.
  """
  path = directory / "experts.jsonl"
  stage, done = experiment.stages[arm], read(path)
  if stage.model.moe is None or any(row["arm"] == arm for row in done):
    return
  context = make_context(experiment, directory, say=say)
  start = Start(
    context=context,
    name=arm,
    stage=stage,
    locate=lambda name: str(directory / "stages" / name / "model"),
  )
  end = load_model(
    directory / "stages" / arm / "model",
    like=decoder_lm.abstract_params,
    with_optimizer=False,
  )
  for when, model in (("start", start.model()), ("end", end)):
    row = {"arm": arm, "when": when, **_row(start, model)}
    done.append(row | _load(context, start, model))
  lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in done]
  files.replace_text(path, "".join(lines))
  say(f"{arm}: compared its experts")


def read(path: epath.Path) -> list[Record]:
  """The rows of `measure`; none where there is no file."""
  return read_rows(path) if path.exists() else []


def _row(start: Start, model: StoredModel) -> Record:
  """Cosines between experts, and with what they copy, by kernel and layer."""
  kernels, way = expert_kernels(model), _way(start)
  count = next(iter(kernels.values())).shape[1]
  groups = np.zeros(count, np.int64)
  parents = None
  if way is not None:
    assert start.source is not None
    groups = np.asarray([way.parent(e).units.start for e in range(count)])
    parents = _parents(start.source, way, count)
  return {
    "between": {
      name: between(kernel, groups).tolist() for name, kernel in kernels.items()
    },
    "parent": None
    if parents is None
    else {
      name: _cosine(kernel, parents[name]).mean(1).tolist()
      for name, kernel in kernels.items()
    },
  }


def _way(start: Start) -> Upcycling | None:
  """How the arm was made; None from scratch."""
  init = start.stage.init
  if not isinstance(init, ScaleOut):
    return None
  assert start.source is not None
  way = plan_scale_out(start.source.config, start.stage.model, init).way
  assert isinstance(way, Upcycling)
  return way


def expert_kernels(model: StoredModel) -> Kernels:
  """The experts' kernels by name: gate, up and down."""
  tree = ArrayTree(model.params)
  return {
    _short(name): np.asarray(tree.read(name), np.float64)
    for name, spec in model_leaves(model.config).items()
    if spec.axes.has("expert", Role.NEITHER)
  }


def _short(name: str) -> str:
  return name.rpartition(".")[2].removesuffix("_kernel")


def _parents(source: StoredModel, way: Upcycling, count: int) -> Kernels:
  """Of every expert the units of the dense FFN that it copies."""
  tree, found = ArrayTree(source.params), {}
  for name, spec in model_leaves(source.config).items():
    dim = spec.axes.index("mlp")
    if dim is None:
      continue
    kernel = np.asarray(tree.read(name), np.float64)
    parts = [
      kernel.take(np.arange(kernel.shape[dim])[way.parent(e).units], axis=dim)
      for e in range(count)
    ]
    found[_short(name)] = np.stack(parts, axis=1)
  return found


def between(
  kernel: Float[np.ndarray, "L E ..."], groups: Int[np.ndarray, "E"]
) -> Float[np.ndarray, "L"]:
  """The mean cosine over the pairs of experts of one group, a layer.

  Args:
    kernel: of all experts.
    groups: which experts are compared: those of equal numbers.

  Returns:
    The means.
  """
  flat = _normed(kernel)
  cosines = np.einsum("len,lfn->lef", flat, flat)
  first, second = np.triu_indices(len(groups), k=1)
  same = groups[first] == groups[second]
  return cosines[:, first[same], second[same]].mean(1)


def _cosine(
  kernel: Float[np.ndarray, "L E ..."], other: Float[np.ndarray, "L E ..."]
) -> Float[np.ndarray, "L E"]:
  return np.einsum("len,len->le", _normed(kernel), _normed(other))


def _normed(
  kernel: Float[np.ndarray, "L E ..."],
) -> Float[np.ndarray, "L E n"]:
  flat = kernel.reshape(*kernel.shape[:2], -1)
  return flat / np.linalg.norm(flat, axis=-1, keepdims=True)


def _load(context: Context, start: Start, model: StoredModel) -> Record:
  """Of the first validation batch of every language, a layer."""
  train = start.stage.train
  evaluator = context.evaluator(
    model.config,
    split="validation",
    sequence_length=train.sequence_length,
    max_tokens=train.evaluate_tokens,
  )
  return balance(evaluator.route(model.params), config=model.config)


def balance(
  chosen: Int[np.ndarray, "L B T A"], *, config: ModelConfig
) -> Record:
  """How even the load is: max / mean, and the entropy over that of even load.

  Args:
    chosen: the experts of every token; -1 is none.
    config: of the model.

  Returns:
    Both, by layer.
  """
  assert config.moe is not None
  count = config.moe.num_experts
  load = np.asarray(
    [
      np.bincount(of_layer[of_layer >= 0], minlength=count)
      for of_layer in chosen
    ]
  )
  share = load / load.sum(-1, keepdims=True)
  safe = np.where(share > 0, share, 1.0)
  entropy = -np.sum(safe * np.log(safe), axis=-1) / np.log(count)
  return {
    "max_over_mean": (count * share.max(-1)).tolist(),
    "entropy": entropy.tolist(),
  }
