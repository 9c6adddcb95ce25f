"""What the verbs of single models share."""

from __future__ import annotations

import dataclasses
import json

import pytest

from aquila_jax.cli import model_flags
from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import MoeConfig
from tests.cli import tiny
from tests.cli.commands import names


def _message(call, *arguments, **keywords) -> str:
  with pytest.raises(UserError) as error:
    call(*arguments, **keywords)
  return str(error.value)


def test_stage_is_the_chosen_one():
  assert model_flags.stage_name(tiny.experiment(), "control") == "control"
  # The choice counts, whatever the kind.
  assert (
    model_flags.stage_name(tiny.experiment(), "dense", kind="scale_up")
    == "dense"
  )


def test_only_stage_of_its_kind_is_meant():
  name = model_flags.stage_name(tiny.experiment(), "", kind="scale_out")
  assert name == "scale_out"


def test_only_stage_is_meant():
  alone = dataclasses.replace(tiny.experiment(), pipeline=("scale_up",))
  assert model_flags.stage_name(alone, "") == "scale_up"
  assert model_flags.stage_name(alone, "", kind="load") == "scale_up"


def test_choice_among_several_stages_is_asked_for():
  message = (
    "the config has 4 stages; choose one with"
    " --stage=dense|scale_up|scale_out|control"
  )
  experiment = tiny.experiment()
  assert _message(model_flags.stage_name, experiment, "") == message
  # Two stages start from scratch.
  assert (
    _message(model_flags.stage_name, experiment, "", kind="scratch") == message
  )


def test_unknown_stage_is_named_with_the_nearest():
  assert _message(model_flags.stage_name, tiny.experiment(), "scale") == (
    "--stage='scale' is unknown; did you mean 'scale_up'?"
  )


def test_section_is_built_of_flags():
  made = model_flags.build(MoeConfig, num_experts=4, top_k=1)
  assert made == MoeConfig(num_experts=4, top_k=1)


def test_message_of_a_section_names_the_flag():
  assert _message(model_flags.build, MoeConfig, num_experts=1) == (
    "--num_experts=1: need >= 2"
  )
  assert _message(
    model_flags.build, ScaleOut, source="a", method="sparse_upcyling"
  ) == (
    "--method='sparse_upcyling' is unknown; did you mean 'sparse_upcycling'?"
    " (expected one of sparse_upcycling, granular, drop_upcycling, noise,"
    " branch_train_mix, average, merge_by_usage)"
  )


def test_output_that_is_taken_is_refused(tmp_path):
  assert _message(model_flags.check_output, str(tmp_path)) == (
    f"--output={str(tmp_path)!r}: it exists; choose another"
  )


def test_output_below_a_file_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  output = str(tmp_path / "file" / "model")
  assert _message(model_flags.check_output, output) == (
    f"--output={output!r}: cannot be made: File exists"
  )
  assert _message(model_flags.write_json, output, {}) == (
    f"--output={output!r}: cannot be written: File exists"
  )


def test_directories_above_an_output_are_made(tmp_path):
  model_flags.check_output(str(tmp_path / "a" / "b" / "model"))
  assert names(tmp_path / "a" / "b") == []


def test_json_is_written_whole_and_replaced(tmp_path):
  file = tmp_path / "new" / "scores.json"
  model_flags.write_json(file, {"loss": 1.5})
  model_flags.write_json(file, {"language": "中文"})
  assert json.loads(file.read_text(encoding="utf-8")) == {"language": "中文"}
  assert "中文" in file.read_text(encoding="utf-8")
  assert names(file.parent) == ["scores.json"]


def test_json_that_cannot_be_made_leaves_the_old_file(tmp_path):
  file = tmp_path / "scores.json"
  model_flags.write_json(file, {"loss": 1.5})
  with pytest.raises(TypeError):
    model_flags.write_json(file, {"loss": object()})
  assert json.loads(file.read_text(encoding="utf-8")) == {"loss": 1.5}
  assert names(tmp_path) == ["scores.json"]


def test_model_is_described_in_one_line(dense):
  model = tiny.load(dense)
  # 12,288 of the table, 6,272 of attention, 12,288 of FFNs, 160 of norms.
  assert model_flags.describe(model, with_optimizer=True) == (
    "31.0K parameters, trained 7 steps on 3.6K tokens, with optimizer state"
  )
  # Of 4 experts a token uses 2: half of 4 FFNs; a router of 2 * 32 * 4.
  mixture = dataclasses.replace(
    model,
    moments=None,
    config=dataclasses.replace(
      model.config, moe=MoeConfig(num_experts=4, top_k=2)
    ),
  )
  assert model_flags.describe(mixture, with_optimizer=False) == (
    "68.1K parameters (43.6K active), trained 7 steps on 3.6K tokens, without"
    " optimizer state"
  )
