"""The MODEL directory: whole or not at all, and exact."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from aquila_jax import version
from aquila_jax.core import files, model_dir
from aquila_jax.core.errors import UserError
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.models import decoder_lm

CONFIG = ModelConfig(
  vocab_size=16,
  num_layers=2,
  embed_dim=4,
  mlp_dim=6,
  num_heads=2,
  num_kv_heads=1,
  head_dim=2,
  param_dtype="bfloat16",
  moe=MoeConfig(num_experts=2, top_k=1),
)
AXES = decoder_lm.parameter_axes(CONFIG)


@functools.cache
def _model() -> StoredModel:
  params = jax.jit(functools.partial(decoder_lm.init_params, CONFIG))(
    key=jax.random.key(0)
  )
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  return StoredModel(
    config=CONFIG,
    lineage=Lineage().then(Event(kind="train", steps=3, tokens=12, flops=1.5)),
    params=params,
    tokenizer='{"version": "1.0", "文": "字"}',
    moments=AdamMoments(
      count=jnp.asarray(3, jnp.int32),
      mu=jax.tree.map(lambda leaf: leaf / 3, wide),
      nu=jax.tree.map(jnp.square, wide),
    ),
    ema=jax.tree.map(lambda leaf: leaf / 7, wide),
  )


def _load(path, **options) -> StoredModel:
  return model_dir.load_model(path, like=decoder_lm.abstract_params, **options)


def _assert_trees_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_is_exact(tmp_path):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  loaded = _load(tmp_path / "model")
  assert loaded.config == CONFIG
  assert loaded.lineage == _model().lineage
  assert loaded.tokenizer == _model().tokenizer
  for name in ("params", "moments", "ema"):
    _assert_trees_equal(getattr(loaded, name), getattr(_model(), name))


def test_optimizer_and_average_may_be_left_out(tmp_path):
  lean = dataclasses.replace(_model(), moments=None, ema=None)
  model_dir.save_model(tmp_path / "lean", lean, axes=AXES)
  loaded = _load(tmp_path / "lean")
  assert loaded.moments is None
  assert loaded.ema is None
  names = sorted(path.name for path in (tmp_path / "lean").iterdir())
  assert names == ["config.json", "params", "tokenizer.json"]


def test_optimizer_is_not_read_where_it_is_not_wanted(tmp_path):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  assert _load(tmp_path / "model", with_optimizer=False).moments is None


def test_header_describes_the_model(tmp_path):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  header = json.loads((tmp_path / "model" / "config.json").read_text())
  assert header["format"] == 1
  assert header["package_version"] == version.VERSION
  assert header["model"]["moe"]["num_experts"] == 2
  assert model_dir.read_header(tmp_path / "model") == model_dir.Header(
    config=CONFIG,
    lineage=_model().lineage,
    has_tokenizer=True,
    stop_tokens=(),
    begin_token=None,
    chat_template=None,
  )


def test_a_model_without_a_tokenizer_and_with_stop_tokens(tmp_path):
  stored = dataclasses.replace(
    _model(), tokenizer=None, stop_tokens=(2, 7), begin_token=3
  )
  model_dir.save_model(tmp_path / "model", stored, axes=AXES)
  assert not (tmp_path / "model" / "tokenizer.json").exists()
  loaded = _load(tmp_path / "model")
  assert loaded.tokenizer is None
  assert loaded.stop_tokens == (2, 7)
  assert loaded.begin_token == 3


def test_a_chat_template_is_kept_as_it_is(tmp_path):
  template = "{% for m in messages %}\r\n{{ m }}字\n{% endfor %}"
  stored = dataclasses.replace(_model(), chat_template=template)
  model_dir.save_model(tmp_path / "model", stored, axes=AXES)
  assert _load(tmp_path / "model").chat_template == template
  assert model_dir.read_header(tmp_path / "model").chat_template == template


def _shapes() -> StoredModel:
  return dataclasses.replace(
    _model(),
    params=decoder_lm.abstract_params(CONFIG),
    moments=None,
    ema=None,
  )


def _write_leaves(writer, *, but: str = "") -> None:
  for path, leaf in jax.tree.leaves_with_path(_model().params):
    name = ".".join(entry.key for entry in path)
    if name != but:
      writer.params.write(name, leaf)


def test_leaves_written_one_by_one_are_the_model(tmp_path):
  with model_dir.writing(tmp_path / "new", _shapes(), axes=AXES) as writer:
    _write_leaves(writer)
    assert not (tmp_path / "new").exists()
  loaded = _load(tmp_path / "new")
  _assert_trees_equal(loaded.params, _model().params)
  assert dataclasses.replace(loaded, params=None) == dataclasses.replace(
    _model(), params=None, moments=None, ema=None
  )


@pytest.mark.parametrize("kind", [UserError, KeyboardInterrupt, SystemExit])
def test_an_exception_while_writing_leaves_nothing(tmp_path, kind):
  with (
    pytest.raises(kind),
    model_dir.writing(tmp_path / "new", _shapes(), axes=AXES) as writer,
  ):
    _write_leaves(writer, but="lm_head.kernel")
    raise kind("stopped")
  assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_complete_leaves_nothing(tmp_path):
  with (
    pytest.raises(AssertionError, match=r"\{'lm_head.kernel': 64\}"),
    model_dir.writing(tmp_path / "new", _shapes(), axes=AXES) as writer,
  ):
    _write_leaves(writer, but="lm_head.kernel")
  assert list(tmp_path.iterdir()) == []


def test_a_header_from_before_tokenizers_were_optional(tmp_path):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  file = tmp_path / "model" / "config.json"
  header = json.loads(file.read_text())
  del header["text"]
  file.write_text(json.dumps(header))
  assert _load(tmp_path / "model").tokenizer == _model().tokenizer


def test_nothing_is_overwritten(tmp_path):
  target = tmp_path / "model"
  target.mkdir()
  with pytest.raises(UserError) as error:
    model_dir.save_model(target, _model(), axes=AXES)
  assert str(error.value) == f"{target} exists; choose another output"
  assert list(target.iterdir()) == []


def test_without_a_rename_config_json_marks_a_model_as_whole(
  tmp_path, monkeypatch
):
  """As on gs://."""
  monkeypatch.setattr(files, "has_rename", lambda path: False)
  target = tmp_path / "model"
  with pytest.raises(RuntimeError), model_dir.new_directory(target) as place:
    assert place == epath.Path(target)
    (place / "params").mkdir()
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []
  # What a writer leaves that is killed.
  (target / "params").mkdir(parents=True)
  (target / "params" / "left.bin").write_text("half")
  with pytest.raises(UserError) as error:
    _load(target)
  assert str(error.value) == (
    f"MODEL={str(target)!r} is not a MODEL directory: it has no config.json"
  )
  written = []
  write_text = type(epath.Path(target)).write_text

  def noted(self, text):
    written.append(self.relative_to(target).as_posix())
    return write_text(self, text)

  monkeypatch.setattr(type(epath.Path(target)), "write_text", noted)
  model_dir.save_model(target, _model(), axes=AXES)
  assert written[-1] == "config.json"
  assert "params/_METADATA" in written[:-1]
  assert [path.name for path in tmp_path.iterdir()] == ["model"]
  _assert_trees_equal(_load(target).params, _model().params)
  before = sorted(target.rglob("*"))
  with pytest.raises(UserError) as error:
    model_dir.save_model(target, _model(), axes=AXES)
  assert str(error.value) == f"{target} exists; choose another output"
  assert sorted(target.rglob("*")) == before


def test_what_threads_still_write_of_a_failed_model_is_removed(
  tmp_path, monkeypatch
):
  """As of TensorStore, which raises for one chunk of several."""
  remove, removed = type(epath.Path(tmp_path)).rmtree, []

  def interfered(self):
    removed.append(self)
    if len(removed) < 3:
      raise OSError(errno.ENOTEMPTY, "Directory not empty", "params")
    remove(self)

  monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", interfered)
  with (
    pytest.raises(KeyError),
    model_dir.new_directory(tmp_path / "model") as m,
  ):
    (m / "half").write_text("")
    raise KeyError
  assert len(removed) == 3
  assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_output_do_not_disturb_each_other(tmp_path):
  target = tmp_path / "model"
  with model_dir.new_directory(target) as partial:
    (partial / "file").write_text("of the first")
    with pytest.raises(UserError) as error:
      model_dir.save_model(target, _model(), axes=AXES)
    assert str(error.value) == f"{target} is being written by another process"
  assert (target / "file").read_text() == "of the first"
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Writes a model and is killed by the operating system when `victim` is called.
_KILLED_WRITER = """
import os, signal, sys
import jax, jax.numpy as jnp
from aquila_jax.core import array_store, model_dir
from aquila_jax.core.axes import LeafAxes, writes
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig

path, victim = sys.argv[1:]
def kill(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)
setattr(*{
  "arrays": (array_store, "_orbax_metadata"),
  "header": (model_dir, "_header"),
}[victim], kill)
config = ModelConfig(vocab_size=8, num_layers=1, embed_dim=4, mlp_dim=4,
                     num_heads=1, num_kv_heads=1, head_dim=2)
model_dir.save_model(path, model_dir.StoredModel(
  config=config, lineage=Lineage(), params={"scale": jnp.ones(4)},
  tokenizer="{}"), axes={"scale": LeafAxes((writes("embed"),))})
"""


@pytest.mark.parametrize("victim", ["arrays", "header"])
def test_killed_writer_leaves_no_model_and_the_next_one_succeeds(
  tmp_path, victim
):
  target = tmp_path / "model"
  killed = subprocess.run(
    [sys.executable, "-c", _KILLED_WRITER, str(target), victim], check=False
  )
  assert killed.returncode == -signal.SIGKILL
  assert [path.name for path in tmp_path.iterdir()] == [".model.partial"]
  with pytest.raises(UserError):
    model_dir.read_header(target)
  model_dir.save_model(target, _model(), axes=AXES)
  _assert_trees_equal(_load(target).params, _model().params)
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_path_is_named_with_the_nearest_model(tmp_path):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  wrong = tmp_path / "modle"
  with pytest.raises(UserError) as error:
    _load(wrong, what="--source")
  assert str(error.value) == (
    f"--source={str(wrong)!r}: there is no such directory; did you mean"
    f" {str(tmp_path / 'model')!r}?"
  )
  with pytest.raises(UserError) as error:
    _load(tmp_path)
  assert str(error.value) == (
    f"MODEL={str(tmp_path)!r} is not a MODEL directory: it has no config.json;"
    f" did you mean {str(tmp_path / 'model')!r}?"
  )
  with pytest.raises(UserError) as error:
    _load(tmp_path / "far" / "away")
  assert str(error.value) == (
    f"MODEL={str(tmp_path / 'far' / 'away')!r}: there is no such directory"
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda header: header.update(format=2), "format 2, this version reads 1"),
    (
      lambda header: header["model"].update(num_layer=3),
      "num_layer=3 is not a field of {file}:model; did you mean 'num_layers'?",
    ),
  ],
)
def test_header_of_another_kind_is_refused(tmp_path, change, message):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  file = tmp_path / "model" / "config.json"
  header = json.loads(file.read_text())
  change(header)
  file.write_text(json.dumps(header))
  with pytest.raises(UserError) as error:
    _load(tmp_path / "model")
  separator = ": " if message.startswith("format") else ":model."
  assert str(error.value) == f"{file}{separator}{message.format(file=file)}"


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"format": 1}', '{"model": 3, "lineage": []}', "\0"]
)
def test_damaged_header_is_refused_in_one_line(tmp_path, text):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  file = tmp_path / "model" / "config.json"
  file.write_text(text)
  with pytest.raises(UserError) as error:
    _load(tmp_path / "model")
  assert str(error.value).startswith(f"{file} is not a MODEL header: ")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["params", "optimizer", "ema"])
def test_flipped_bit_in_any_array_is_found(tmp_path, part):
  model_dir.save_model(tmp_path / "model", _model(), axes=AXES)
  directory = tmp_path / "model" / part
  chunk = next(path for path in directory.glob("*/c/**/*") if path.is_file())
  damaged = bytearray(chunk.read_bytes())
  damaged[1] ^= 4
  chunk.write_bytes(bytes(damaged))
  with pytest.raises(UserError) as error:
    _load(tmp_path / "model")
  leaf = chunk.relative_to(directory).parts[0]
  assert str(error.value).startswith(f"{directory}: leaf {leaf!r} is damaged: ")


@pytest.mark.parametrize("missing", ["tokenizer.json", "params"])
def test_a_model_that_lost_a_part_is_not_whole(tmp_path, missing):
  path = tmp_path / "model"
  model_dir.save_model(path, _model(), axes=AXES)
  part = path / missing
  if part.is_dir():
    shutil.rmtree(part)
  else:
    part.unlink()
  with pytest.raises(UserError) as caught:
    _load(path)
  assert str(caught.value) == f"{part} is missing; this MODEL is not whole"
