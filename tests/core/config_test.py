"""The door: every key is used, and every mistake is named in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any, Literal

import pytest

from aquila_jax.core import config
from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import ExperimentConfig, Load, Scratch
from tests.golden import resolved


def _tree() -> dict[str, Any]:
  """The quickstart with every default filled in."""
  return copy.deepcopy(config.to_dict(resolved.experiment("quickstart")))


def _at(tree: dict[str, Any], path: str) -> dict[str, Any]:
  for key in path.split(".") if path else ():
    tree = tree[key]
  return tree


def _message(tree: dict[str, Any]) -> str:
  with pytest.raises(UserError) as error:
    config.build(ExperimentConfig, tree)
  return str(error.value)


# Every section of a config, and a typo of one of its fields.
TYPOS = [
  ("", "sede", "seed"),
  ("data", "sorces", "sources"),
  ("data.sources.jionlp", "languge", "language"),
  ("data.tokenizer", "vocabsize", "vocab_size"),
  ("data.cleaning", "min_charaters", "min_characters"),
  ("stages.dense", "modle", "model"),
  ("stages.scale_up.init", "methode", "method"),
  ("stages.scale_up.init.ligo", "step", "steps"),
  ("stages.scale_out.init", "optimiser", "optimizer"),
  ("stages.dense.model", "num_layer", "num_layers"),
  ("stages.scale_out.model.moe", "topk", "top_k"),
  ("stages.dense.train", "step", "steps"),
  ("stages.dense.train.optimizer", "learning_rat", "learning_rate"),
  ("stages.dense.train.loss", "balanse", "balance"),
  ("stages.dense.train.freeze", "new_onyl", "new_only"),
  ("stages.dense.train.spikes", "sigma", "sigmas"),
  ("stages.dense.train.checkpoint", "every_step", "every_steps"),
  ("evaluation", "promts", "prompts"),
  ("mesh", "tensors", "tensor"),
]


@pytest.mark.parametrize(("section", "typo", "meant"), TYPOS)
def test_typo_is_named_with_the_nearest_field(section, typo, meant):
  tree = _tree()
  _at(tree, section)[typo] = 1
  path = f"config.{section}" if section else "config"
  assert _message(tree) == (
    f"{path}.{typo}=1 is not a field of {path}; did you mean {meant!r}?"
  )


def test_typos_cover_every_section():
  """A section added to the config must be added to TYPOS."""
  sections = set()

  def walk(node: Any, path: str):
    if not isinstance(node, dict):
      return
    sections.add(path)
    for key, value in node.items():
      walk(value, f"{path}.{key}" if path else key)

  walk(_tree(), "")
  kinds = {section.rsplit(".", 1)[-1] for section in sections}
  named = {section.rsplit(".", 1)[-1] for section, _, _ in TYPOS}
  # Sections whose names are the user's: sources and stages.
  chosen = set(_tree()["data"]["sources"]) | set(_tree()["stages"])
  assert kinds - chosen - {"sources", "stages"} == named - chosen
  assert named & set(_tree()["data"]["sources"])
  assert named & set(_tree()["stages"])


@pytest.mark.parametrize(
  ("section", "field", "value", "message"),
  [
    (
      "stages.dense.train",
      "batch_size",
      8.0,
      "config.stages.dense.train.batch_size=8.0: expected int, got float",
    ),
    ("", "seed", True, "config.seed=True: expected int, got bool"),
    (
      "stages.dense.train.optimizer",
      "learning_rate",
      "1e-3",
      "config.stages.dense.train.optimizer.learning_rate='1e-3': expected"
      " float, got str",
    ),
    (
      "stages.dense.train.optimizer",
      "learning_rate",
      float("nan"),
      "config.stages.dense.train.optimizer.learning_rate=nan: expected a"
      " finite number",
    ),
    (
      "stages.dense.train.optimizer",
      "schedule",
      "cosin",
      "config.stages.dense.train.optimizer.schedule='cosin' is unknown; did"
      " you mean 'cosine'? (expected one of cosine, wsd, constant)",
    ),
    (
      "stages.scale_up.init",
      "kind",
      "scaleup",
      "config.stages.scale_up.init.kind='scaleup' is unknown; did you mean"
      " 'scale_up'?",
    ),
    (
      "stages.scale_up",
      "init",
      {},
      "config.stages.scale_up.init.kind is missing; valid: load, scale_out,"
      " scale_up, scratch",
    ),
    (
      "stages.dense",
      "model",
      3,
      "config.stages.dense.model=3: expected a section of fields",
    ),
    (
      "data",
      "sources",
      "corpus:jionlp",
      "config.data.sources='corpus:jionlp': expected a section of names",
    ),
    (
      "evaluation",
      "prompts",
      "one",
      "config.evaluation.prompts='one': expected a tuple",
    ),
    (
      "evaluation",
      "prompts",
      ["one", 2],
      "config.evaluation.prompts[1]=2: expected str, got int",
    ),
    (
      "stages.dense.train.freeze",
      "layers",
      [1],
      "config.stages.dense.train.freeze.layers=[1]: expected 2 values",
    ),
    (
      "stages.control.model.moe",
      "layers",
      "every_other",
      "config.stages.control.model.moe.layers='every_other': expected one of"
      " all, every_second, last_half, or numbers",
    ),
    (
      "stages.control.model.moe",
      "layers",
      [1, "x"],
      "config.stages.control.model.moe.layers[1]='x': expected int, got str",
    ),
    (
      "stages.control.model.moe",
      "layers",
      [3, 1],
      "config.stages.control.model.moe: layers=(3, 1): need layers from 0 in"
      " rising order, each once, at least one",
    ),
    (
      "stages.control.model.moe",
      "layers",
      [1, 99],
      "config.stages.control.model: moe.layers=(1, 99): need layers below"
      " num_layers=6",
    ),
    (
      "stages.dense.train",
      "optimizer",
      {},
      "config.stages.dense.train.optimizer.learning_rate is missing; it has"
      " no default",
    ),
  ],
)
def test_ill_typed_value_is_refused(section, field, value, message):
  tree = _tree()
  _at(tree, section)[field] = value
  assert _message(tree) == message


def test_section_given_under_an_unknown_name_is_not_printed_whole():
  tree = _tree()
  tree["evaluations"] = {"split": "test"}
  assert _message(tree) == (
    "config.evaluations={...} is not a field of config; did you mean"
    " 'evaluation'?"
  )


def test_values_refused_by_their_own_class_are_named_with_the_section():
  tree = _tree()
  tree["stages"]["dense"]["model"]["num_heads"] = 3
  assert _message(tree) == (
    "config.stages.dense.model: num_heads=3 is not a multiple of num_kv_heads=2"
  )


@pytest.mark.parametrize("name", resolved.names())
def test_to_dict_and_json_are_undone_by_build(name):
  experiment = resolved.experiment(name)
  stored = json.loads(json.dumps(config.to_dict(experiment)))
  assert config.build(ExperimentConfig, stored) == experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sample:
  """One field of each kind that build knows."""

  number: float = 0.0
  choice: Literal["a", "b"] = "a"
  pair: tuple[int, int] = (0, 0)
  maybe: float | None = None
  start: Scratch | Load = Scratch()


def test_values_are_converted_to_their_types():
  sample = config.build(
    _Sample,
    {
      "number": 2,
      "choice": "b",
      "pair": [1, 2],
      "maybe": None,
      "start": {"kind": "load", "path": "x"},
    },
  )
  assert sample == _Sample(
    number=2.0, choice="b", pair=(1, 2), maybe=None, start=Load(path="x")
  )
  assert type(sample.number) is float
  assert config.build(_Sample, {"maybe": 3}).maybe == 3.0
  assert config.build(_Sample, {}) == _Sample()


def test_differences_name_the_fields():
  old, new = _tree(), _tree()
  steps = old["stages"]["dense"]["train"]["steps"]
  new["seed"] = 7
  new["stages"]["dense"]["train"]["steps"] = 1
  new["mesh"]["extra"] = 2
  assert config.differences(old, old) == []
  assert config.differences(old, new) == [
    "config.mesh.extra: None -> 2",
    "config.seed: 0 -> 7",
    f"config.stages.dense.train.steps: {steps} -> 1",
  ]
