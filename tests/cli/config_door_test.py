"""The door: what --config and --config.a.b=value mean, and what they refuse."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from aquila_jax.cli import config_door
from aquila_jax.core import config as config_lib
from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import ExperimentConfig
from tests.cli.commands import ROOT

SMOKE = str(ROOT / "experiments/configs/smoke.py")


def _load(*overrides: tuple[str, str]) -> ExperimentConfig:
  return config_door.load_file(SMOKE, overrides)


def _field(experiment: ExperimentConfig, name: str) -> Any:
  node = config_lib.to_dict(experiment)
  for key in name.split("."):
    node = node[key]
  return node


def _refused(path: str, *overrides: tuple[str, str]) -> str:
  with pytest.raises(UserError) as error:
    config_door.load_file(path, overrides)
  message = str(error.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(
  ("name", "text", "value"),
  [
    # In place of a value of the file.
    ("seed", "3", 3),
    ("mesh.data", "-1", -1),
    ("seed", "0x10", 16),
    ("stages.dense.train.optimizer.learning_rate", "1e-4", 1e-4),
    ("stages.dense.train.optimizer.learning_rate", "1", 1.0),
    ("stages.dense.model.tied_embeddings", "False", False),
    ("stages.dense.model.tied_embeddings", "false", False),
    ("data.validation_share", "0.25", 0.25),
    ("stages.scale_up.init.method", "aki", "aki"),
    # A string stays one, whatever it looks like.
    ("name", "7", "7"),
    ("name", "true", "true"),
    ("name", "none", "none"),
    ("name", "a=b", "a=b"),
    ("name", "河", "河"),
    # Where the file has none and the default stands.
    ("stages.dense.model.init_std", "0.5", 0.5),
    ("stages.dense.model.qkv_bias", "TRUE", True),
    ("stages.dense.model.remat", "full", "full"),
    ("stages.dense.model.scan_layers", "false", False),
    ("stages.dense.train.optimizer.schedule", "wsd", "wsd"),
    ("data.seed", "5", 5),
    ("data.prepared", "some/where", "some/where"),
    # In sections that the file does not have.
    ("mesh.expert", "2", 2),
    ("stages.dense.train.loss.lm_z", "0.1", 0.1),
    ("stages.dense.train.freeze.new_only", "true", True),
    # None, and back.
    ("stages.dense.train.optimizer.clip_norm", "None", None),
    ("stages.dense.train.optimizer.clip_norm", "null", None),
    ("stages.dense.train.optimizer.ema_decay", "0.9", 0.9),
    ("stages.control.model.moe", "none", None),
    # Tuples.
    ("stages.dense.train.freeze.axes", "vocab", ["vocab"]),
    ("stages.dense.train.freeze.axes", "vocab,mlp", ["vocab", "mlp"]),
    ("pipeline", "dense", ["dense"]),
    ("pipeline", "dense,scale_up", ["dense", "scale_up"]),
    ("pipeline", "('dense', 'scale_up')", ["dense", "scale_up"]),
    ("pipeline", "['dense']", ["dense"]),
    ("stages.scale_up.init.compare", "fpi,aki", ["fpi", "aki"]),
    ("stages.scale_up.init.compare", "()", []),
    ("stages.dense.train.freeze.layers", "0,2", [0, 2]),
    ("stages.dense.train.freeze.axes", "('vocab',)", ["vocab"]),
    # A word or numbers.
    ("stages.control.model.moe.layers", "last_half", "last_half"),
    ("stages.control.model.moe.layers", "1", [1]),
    ("stages.control.model.moe.layers", "0,1", [0, 1]),
    ("stages.control.model.moe.layers", "(1,)", [1]),
    ("evaluation.prompts", "The river", ["The river"]),
    ("evaluation.prompts", "('a, b', 'c')", ["a, b", "c"]),
    ("evaluation.prompts", "7", ["7"]),
  ],
)
def test_override_means(name, text, value):
  found = _field(_load((name, text)), name)
  assert (found, type(found)) == (value, type(value))


def test_numbers_of_the_file_can_become_others_and_a_word():
  name = "stages.control.model.moe.layers"
  for first in ("0", "0,1"):
    for text, value in (("1", [1]), ("0,1", [0, 1]), ("all", "all")):
      assert _field(_load((name, first), (name, text)), name) == value


def test_only_the_named_field_changes():
  changed = _load(("stages.dense.train.batch_size", "4"))
  assert config_lib.differences(
    config_lib.to_dict(_load()), config_lib.to_dict(changed)
  ) == ["config.stages.dense.train.batch_size: 8 -> 4"]


@pytest.mark.parametrize("name", ["scale_out", "control"])
def test_dict_that_the_file_uses_twice_is_changed_in_one_place(name):
  """The smoke config gives one dict to the mixture and to its control."""
  changed = _load((f"stages.{name}.model.moe.block_size", "8"))
  assert config_lib.differences(
    config_lib.to_dict(_load()), config_lib.to_dict(changed)
  ) == [f"config.stages.{name}.model.moe.block_size: 32 -> 8"]


def test_reference_of_the_file_follows_an_override(tmp_path):
  file = tmp_path / "references.py"
  file.write_text(
    f"""
import runpy
def get_config():
  config = runpy.run_path({SMOKE!r})["get_config"]()
  config.data.seed = config.get_ref("seed")
  return config
"""
  )
  changed = config_door.load_file(str(file), [("seed", "3")])
  assert (changed.seed, changed.data.seed) == (3, 3)


def test_section_that_is_none_is_made():
  moe = _load(("stages.dense.model.moe.num_experts", "4")).stages["dense"].model
  assert moe.moe is not None
  assert (moe.moe.num_experts, moe.moe.top_k) == (4, 2)


def test_source_is_added():
  experiment = _load(
    ("data.sources.new.path", "corpus:jionlp"),
    ("data.sources.new.language", "zh"),
    ("data.sources.new.weight", "2"),
  )
  assert sorted(experiment.data.sources) == ["en", "new", "zh"]
  assert experiment.data.sources["new"].path == "corpus:jionlp"
  assert experiment.data.sources["new"].weight == 2.0


def test_section_is_given_whole():
  experiment = _load(("stages.dense.init", "{'kind': 'load', 'path': 'x'}"))
  assert _field(experiment, "stages.dense.init") == {
    "kind": "load",
    "path": "x",
  }


def test_later_override_wins():
  assert _load(("seed", "1"), ("seed", "2")).seed == 2


def test_overrides_do_not_stay_for_the_next_load():
  assert (
    _load(("stages.dense.train.steps", "1")).stages["dense"].train.steps == 1
  )
  assert _load().stages["dense"].train.steps == 40


def test_overrides_are_taken_off_a_command_line(monkeypatch):
  monkeypatch.setattr(config_door, "_overrides", [])
  rest = config_door.take_overrides(
    ["verb", "--config=f.py", "--config.a.b=1=2", "-config.c", "3", "--x=4"]
  )
  assert rest == ["verb", "--config=f.py", "--x=4"]
  assert config_door._overrides == [("a.b", "1=2"), ("c", "3")]
  # One without a value takes what follows, or nothing at the end.
  assert config_door.take_overrides(["verb", "--config.d"]) == ["verb"]
  assert config_door._overrides == [("d", "")]


# In every section of a config. The door makes sections and fields that the file
# does not have; what is unknown must be refused all the same.
TYPOS = [
  ("sede", "seed"),
  ("data.sorces.en.path", "sources"),
  ("data.sources.en.languge", "language"),
  ("data.tokenizer.vocabsize", "vocab_size"),
  ("data.cleaning.min_charaters", "min_characters"),
  ("stages.dense.modle", "model"),
  ("stages.scale_up.init.methode", "method"),
  ("stages.scale_out.init.optimiser", "optimizer"),
  ("stages.dense.model.num_layer", "num_layers"),
  ("stages.scale_out.model.moe.topk", "top_k"),
  ("stages.dense.train.step", "steps"),
  ("stages.dense.train.optimizer.learning_rat", "learning_rate"),
  ("stages.dense.train.loss.balanse", "balance"),
  ("stages.dense.train.freeze.new_onyl", "new_only"),
  ("stages.dense.train.checkpoint.every_step", "every_steps"),
  ("evaluation.promts", "prompts"),
  ("mesh.tensors", "tensor"),
]


@pytest.mark.parametrize(("name", "meant"), TYPOS)
def test_typo_is_named_with_the_nearest_field(name, meant):
  section, _, typo = f"config.{name}".rpartition(".")
  shown = "1"
  if name.startswith("data.sorces"):
    section, typo, shown = "config.data", "sorces", "{...}"
  assert _refused(SMOKE, (name, "1")) == (
    f"{section}.{typo}={shown} is not a field of {section};"
    f" did you mean {meant!r}?"
  )


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    (
      "stages.dens.train.steps",
      "1",
      "--config.stages.dens.train.steps: there is no stage 'dens'; did you mean"
      " 'dense'?",
    ),
    (
      "stages.other.train.steps",
      "1",
      "--config.stages.other.train.steps: there is no stage 'other'; valid:"
      " control, dense, scale_out, scale_up",
    ),
    (
      "seed.x",
      "1",
      "--config.seed.x: config.seed=0 is a value, not a section",
    ),
    (
      "stages.dense.train.steps.x.y",
      "1",
      "--config.stages.dense.train.steps.x.y:"
      " config.stages.dense.train.steps=40 is a value, not a section",
    ),
    ("data", "1", "config.data=1: expected a section of fields"),
    ("stages", "1", "config.stages=1: expected a section of names"),
    ("seed", "", "config.seed='': expected int, got str"),
    ("seed", "1.0", "config.seed=1.0: expected int, got float"),
    ("seed", "one", "config.seed='one': expected int, got str"),
    ("seed", "((((", "config.seed='((((': expected int, got str"),
    (
      "stages.dense.model.num_layers",
      "true",
      "config.stages.dense.model.num_layers=True: expected int, got bool",
    ),
    (
      "stages.dense.train.optimizer.learning_rate",
      "1e999",
      "config.stages.dense.train.optimizer.learning_rate=inf: expected a finite"
      " number",
    ),
    (
      "stages.scale_up.init.method",
      "akipro",
      "config.stages.scale_up.init: method='akipro' is unknown; did you mean"
      " 'aki_pro'? (expected one of fpi, aki, aki_pro, bert2bert, hypercloning,"
      " lemon, msg, ligo, random, or module:function)",
    ),
    (
      "data.sources.new.path",
      "new.txt",
      "config.data.sources.new.language is missing; it has no default",
    ),
    (
      "stages.dense.model.num_heads",
      "0",
      "config.stages.dense.model: num_heads=0: need >= 1",
    ),
    (
      "stages.scale_out.model.moe",
      "none",
      "config.stages.scale_out: model.moe=None: init.kind='scale_out' fills"
      " experts; give model.moe",
    ),
    (
      "pipeline",
      "dense,scaleup",
      "config.pipeline[1]='scaleup' is unknown; did you mean 'scale_up'?",
    ),
    (
      ".seed",
      "1",
      "config.={...} is not a field of config; valid: data, evaluation, mesh,"
      " name, pipeline, seed, stages",
    ),
    # Attributes of a ConfigDict are no fields.
    (
      "keys",
      "1",
      "config.keys=1 is not a field of config; valid: data, evaluation, mesh,"
      " name, pipeline, seed, stages",
    ),
  ],
)
def test_override_is_refused(name, text, message):
  assert _refused(SMOKE, (name, text)) == message


def test_missing_file_is_named_with_the_nearest_one(tmp_path):
  wrong = SMOKE.replace("smoke", "smokey")
  assert _refused(wrong) == (
    f"--config={wrong!r}: there is no such file; did you mean {SMOKE!r}?"
  )
  alone = str(tmp_path / "some.py")
  assert _refused(alone) == f"--config={alone!r}: there is no such file"
  assert _refused(str(tmp_path)) == (
    f"--config={str(tmp_path)!r}: there is no such file"
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\ndef get_config(:\n", "line 2: invalid syntax"),
    ("if True:\nx = 1\n", None),  # the words are Python's, and change
    ("x = 1\n", "it has no get_config()"),
    (
      "def get_config():\n  return {'seed': 0}\n",
      "get_config() gave a dict; expected an ml_collections.ConfigDict",
    ),
    (
      "def get_config():\n  pass\n",
      "get_config() gave a NoneType; expected an ml_collections.ConfigDict",
    ),
    ("import no_such_module\n", "No module named 'no_such_module'"),
  ],
)
def test_file_that_is_no_config_is_refused(tmp_path, text, message):
  file = tmp_path / "broken.py"
  file.write_text(text)
  found = _refused(str(file))
  if message is None:
    assert found.startswith(f"--config={str(file)!r}: line 2: ")
  else:
    assert found == f"--config={str(file)!r}: {message}"


def test_file_that_is_not_python_is_refused(tmp_path):
  file = tmp_path / "config.yaml"
  file.write_text("seed: 0\n")
  assert _refused(str(file)) == (
    f"--config={str(file)!r}: expected a Python file (.py)"
  )


def test_empty_config_is_refused(tmp_path):
  file = tmp_path / "empty.py"
  file.write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config():\n  return ConfigDict()\n"
  )
  assert _refused(str(file)) == "config.name is missing; it has no default"


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  text = pathlib.Path(SMOKE).read_text(encoding="utf-8")
  (tmp_path / "mine.py").write_text(text, encoding="utf-8")
  assert config_door.load_file("~/mine.py") == _load()
