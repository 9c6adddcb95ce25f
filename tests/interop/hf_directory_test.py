"""Hugging Face directories: files that are missing, damaged, or beside it."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from aquila_jax.core.errors import UserError
from aquila_jax.interop.hf_directory import HFDirectory, Texts
from tests.interop import tiny


def _directory(path: pathlib.Path) -> HFDirectory:
  return HFDirectory(path, what="--source")


def _refusal(path: pathlib.Path) -> str:
  with pytest.raises(UserError) as caught:
    _directory(path)
  return str(caught.value)


def test_tensors_are_described_without_being_read():
  found = _directory(tiny.REFERENCES / "llama_bias")
  held: dict[str, np.ndarray] = {}
  for file in found.path.glob("*.safetensors"):
    for name, value in safetensors.numpy.load_file(file).items():
      held[name] = value
      info = found.tensors[name]
      assert (info.shape, info.dtype, info.file) == (
        value.shape,
        "BF16",
        file.name,
      )
  assert found.tensors.keys() == held.keys()
  for name, value in held.items():
    np.testing.assert_array_equal(found.read(name), value)


def test_files_that_an_index_does_not_name_are_not_read(tmp_path):
  path = tiny.copy_of("llama_bias", tmp_path / "a")
  shutil.copy(
    path / "model-00001-of-00004.safetensors", path / "consolidated.safetensors"
  )
  assert (
    _directory(path).tensors
    == _directory(tiny.REFERENCES / "llama_bias").tensors
  )


def test_files_of_any_name_are_read_where_there_is_no_index(tmp_path):
  path = tiny.copy_of("llama_bias", tmp_path / "a")
  (path / "model.safetensors.index.json").unlink()
  expected = _directory(tiny.REFERENCES / "llama_bias").tensors
  assert _directory(path).tensors == expected
  shutil.copy(
    path / "model-00002-of-00004.safetensors", path / "other.safetensors"
  )
  twice = [
    name
    for name, info in expected.items()
    if info.file == "model-00002-of-00004.safetensors"
  ]
  lines = _refusal(path).splitlines()
  assert lines[0] == f"--source={str(path)!r}: {len(twice)} problems"
  assert sorted(lines[1:]) == [
    f"  {name} is in both model-00002-of-00004.safetensors and"
    " other.safetensors"
    for name in sorted(twice)
  ]


def test_missing_and_damaged_files_are_listed_together(tmp_path):
  path = tiny.copy_of("llama_bias", tmp_path / "a")
  (path / "model-00001-of-00004.safetensors").unlink()
  (path / "model-00003-of-00004.safetensors").write_bytes(b"")
  cut = path / "model-00004-of-00004.safetensors"
  cut.write_bytes(cut.read_bytes()[:-1])
  lines = _refusal(path).splitlines()
  # What follows the colon is the library's.
  assert [line.partition(": ")[0] for line in lines[1:]] == [
    "  model-00001-of-00004.safetensors is missing",
    "  model-00003-of-00004.safetensors is truncated or damaged",
    "  model-00004-of-00004.safetensors is truncated or damaged",
  ]
  assert lines[0] == f"--source={str(path)!r}: 3 problems"


@pytest.mark.parametrize("cut", [1, 100, 9000])
def test_a_truncated_file_is_refused(tmp_path, cut):
  path = tiny.copy_of("llama", tmp_path / "a")
  file = path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-cut])
  message = _refusal(path)
  assert message.startswith(
    f"--source={str(path)!r}: model.safetensors is truncated or damaged: "
  )
  assert "\n" not in message


def test_a_pickle_is_named_and_not_read(tmp_path):
  path = tiny.copy_of("llama", tmp_path / "a")
  (path / "model.safetensors").unlink()
  assert _refusal(path) == f"--source={str(path)!r}: has no *.safetensors"
  (path / "pytorch_model.bin").write_bytes(b"\x80\x02")
  assert _refusal(path) == (
    f"--source={str(path)!r}: has no *.safetensors; pytorch_model.bin is a"
    " pickle, which is not read: save it again with"
    " save_pretrained(safe_serialization=True)"
  )


def test_a_directory_of_something_else_is_refused(tmp_path):
  assert _refusal(tmp_path) == (
    f"--source={str(tmp_path)!r}: expected a Hugging Face directory, with"
    " config.json, or a .gguf file"
  )


@pytest.mark.parametrize(
  ("file", "text", "message"),
  [
    ("config.json", b"[]", "{file}: expected an object"),
    (
      "config.json",
      b"{",
      "{file} is no JSON: Expecting property name enclosed in double quotes:"
      " line 1 column 2 (char 1)",
    ),
    (
      "config.json",
      b"\xff",
      "{file} is no text: 'utf-8' codec can't decode byte 0xff in position 0:"
      " invalid start byte",
    ),
    (
      "model.safetensors.index.json",
      b'{"metadata": {}}',
      "{file}: has no weight_map",
    ),
  ],
)
def test_damaged_json_is_refused(tmp_path, file, text, message):
  path = tiny.copy_of("llama", tmp_path / "a")
  (path / file).write_bytes(text)
  assert _refusal(path) == message.format(file=path / file)


def _texts(tmp_path, **files: Any) -> Texts:
  """Of a directory with these files, JSON or text."""
  path = tiny.copy_of("llama", tmp_path / "a")
  for name, content in files.items():
    file = name.replace("__", ".")
    if isinstance(content, str):
      (path / file).write_bytes(content.encode())
    elif file == "config.json":
      tiny.change_json(path / file, lambda tree, new=content: tree.update(new))
    else:
      (path / file).write_text(json.dumps(content))
  return _directory(path).texts()


def test_texts_that_are_not_there_are_none(tmp_path):
  assert _texts(tmp_path) == Texts(
    tokenizer=None, stop_tokens=(), begin_token=None, chat_template=None
  )


@pytest.mark.parametrize(
  ("config", "generation", "expected"),
  [
    (3, None, 3),
    (3, {"bos_token_id": 5}, 5),
    (None, {"bos_token_id": 0}, 0),
    (-1, None, None),
    (None, None, None),
  ],
)
def test_the_begin_token_is_named_by_either_file(
  config, generation, expected, tmp_path
):
  files: dict[str, Any] = {"config__json": {"bos_token_id": config}}
  if generation is not None:
    files["generation_config__json"] = generation
  assert _texts(tmp_path, **files).begin_token == expected


@pytest.mark.parametrize(
  ("config", "generation", "expected"),
  [
    (2, None, (2,)),
    (2, {}, (2,)),
    (2, {"eos_token_id": None}, (2,)),
    (2, {"eos_token_id": 5}, (5,)),
    (2, {"eos_token_id": [5, 2, 5]}, (5, 2)),
    ([4, 3], None, (4, 3)),
    (None, None, ()),
    (-1, None, ()),
    ("</s>", None, ()),
  ],
)
def test_stop_tokens_are_those_of_generation(
  tmp_path, config, generation, expected
):
  files = {"config__json": {"eos_token_id": config}}
  if generation is not None:
    files["generation_config__json"] = generation
  assert _texts(tmp_path, **files).stop_tokens == expected


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({"chat_template__jinja": "{{ a }}\r\n字\n"}, "{{ a }}\r\n字\n"),
    ({"tokenizer_config__json": {"chat_template": "x"}}, "x"),
    (
      {
        "chat_template__jinja": "y",
        "tokenizer_config__json": {"chat_template": "x"},
      },
      "y",
    ),
    (
      {
        "tokenizer_config__json": {
          "chat_template": [
            {"name": "tools", "template": "a"},
            {"name": "default", "template": "b"},
          ]
        }
      },
      "b",
    ),
    (
      {
        "tokenizer_config__json": {
          "chat_template": [{"name": "tools", "template": "a"}, 3]
        }
      },
      None,
    ),
    ({"tokenizer_config__json": {"chat_template": 3}}, None),
  ],
)
def test_the_chat_template_is_found_where_it_stands(tmp_path, files, expected):
  assert _texts(tmp_path, **files).chat_template == expected


def test_a_tokenizer_is_kept_as_it_is_written(tmp_path):
  text = tiny.tokenizer_json().replace(",", ",\n  ")
  assert _texts(tmp_path, tokenizer__json=text).tokenizer == text


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
  with pytest.raises(UserError) as caught:
    _texts(tmp_path, tokenizer__json="{")
  file = tmp_path / "a" / "tokenizer.json"
  assert str(caught.value) == (
    f"{file} is no tokenizer: EOF while parsing an object at line 1 column 1;"
    " give --tokenizer=tokenizer.json"
  )
  # Not where another one is given.
  assert _directory(tmp_path / "a").texts(with_tokenizer=False) == Texts(
    tokenizer=None, stop_tokens=(), begin_token=None, chat_template=None
  )
