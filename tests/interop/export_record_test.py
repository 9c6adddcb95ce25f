"""aquila_jax.json counts as long as config.json is the one it belongs to."""

from __future__ import annotations

import json

import pytest

from aquila_jax.core.errors import UserError
from aquila_jax.interop import export_record
from aquila_jax.interop.export_model import export_model
from aquila_jax.interop.import_model import open_checkpoint
from tests.interop import tiny

CONFIG, _ = tiny.KINDS["qkv bias, window"]


@pytest.fixture
def exported(tmp_path):
  source = tiny.save(tmp_path / "model", tiny.stored(CONFIG))
  export_model(source, tmp_path / "out", progress=tiny.silent)
  return tmp_path / "out"


def _refusal(path) -> str:
  with pytest.raises(UserError) as caught:
    open_checkpoint(path)
  return str(caught.value)


def test_what_is_written_is_read(exported):
  tree = json.loads((exported / "config.json").read_text())
  record = export_record.read(exported, config_tree=tree)
  assert record == export_record.Record(config=CONFIG, lineage=tiny.LINEAGE)
  (exported / "aquila_jax.json").unlink()
  assert export_record.read(exported, config_tree=tree) is None


@pytest.mark.parametrize(
  ("name", "value", "was"),
  [
    ("rms_norm_eps", 1e-6, 1e-5),
    ("sliding_window", 6, 5),
    ("num_key_value_heads", None, 2),
  ],
)
def test_a_config_json_that_was_changed_since_is_refused(
  exported, name, value, was
):
  tiny.change_json(
    exported / "config.json", lambda tree: tree.update({name: value})
  )
  assert _refusal(exported) == (
    f"{exported / 'config.json'}: {name}={value!r}, but aquila_jax.json was"
    f" written with {was!r}; delete aquila_jax.json to go by config.json"
  )


def test_without_the_record_the_changed_config_json_counts(exported):
  tiny.change_json(
    exported / "config.json", lambda tree: tree.update(rms_norm_eps=1e-6)
  )
  (exported / "aquila_jax.json").unlink()
  assert open_checkpoint(exported).config.norm_epsilon == 1e-6


def test_keys_that_other_tools_add_do_not_matter(exported):
  tiny.change_json(
    exported / "config.json",
    lambda tree: tree.update(transformers_version="9", use_flash=True),
  )
  checkpoint = open_checkpoint(exported)
  assert checkpoint.config == CONFIG
  assert checkpoint.unknown == []


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[]", "{file}: expected an object"),
    ('{"format": 2}', "{file}: format 2, this version reads 1"),
    ("{}", "{file} is damaged: KeyError: 'format'"),
    ('{"format": 1}', "{file} is damaged: KeyError: 'model'"),
    (
      '{"format": 1, "model": 3, "lineage": []}',
      "{file}:model=3: expected a section of fields",
    ),
    (
      '{"format": 1, "model": {"layers": 3}, "lineage": []}',
      "layers=3 is not a field of {file}:model; did you mean 'num_layers'?",
    ),
  ],
)
def test_a_damaged_record_is_refused(exported, text, message):
  file = exported / "aquila_jax.json"
  file.write_text(text)
  found = _refusal(exported)
  # A path of a field is in front of what is said of it.
  assert found.removeprefix(f"{file}:model.") == message.format(file=file)


def test_a_record_of_a_model_that_is_not_this_one_is_refused(exported):
  tiny.change_json(
    exported / "aquila_jax.json",
    lambda tree: tree["model"].update(embed_dim=16),
  )
  assert _refusal(exported) == (
    f"{exported / 'config.json'}: hidden_size=8, but aquila_jax.json was"
    " written with 16; delete aquila_jax.json to go by config.json"
  )
