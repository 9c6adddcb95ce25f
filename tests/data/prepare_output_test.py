"""Where prepare writes: over what is there, again, and when it is stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import pytest

from aquila_jax.data import prepare as prepare_lib
from aquila_jax.data import token_store
from aquila_jax.data.tokenizer import Tokenizer


def test_running_again_finds_everything_done(kit, sources):
  data = kit.config(sources)
  kit.prepare(data)
  before = {
    path: path.stat().st_mtime_ns for path in (kit.folder / "data").rglob("*")
  }
  # Fields on which prepared data do not depend may change.
  again = dataclasses.replace(data, seed=7, prepared="elsewhere")
  for same in (data, again):
    kit.prepare(same)
    assert kit.messages == [f"{kit.folder / 'data'} is prepared"]
  assert before == {
    path: path.stat().st_mtime_ns for path in (kit.folder / "data").rglob("*")
  }


def test_another_config_is_refused(kit, sources):
  kit.prepare(kit.config(sources))
  before = kit.contents(kit.folder / "data")
  for fields, difference in (
    (dict(test_share=0.2), "config.data.test_share: 0.1 -> 0.2"),
    (
      dict(tokenizer=dict(vocab_size=301)),
      "config.data.tokenizer.vocab_size: 300 -> 301",
    ),
    (
      dict(sources=sources | {"b": sources["b"] | {"weight": 2.0}}),
      "config.data.sources.b.weight: 1.0 -> 2.0",
    ),
  ):
    other = kit.config(**({"sources": sources} | fields))
    assert kit.refusal(other) == (
      f"{kit.folder / 'data'} was prepared with another config ({difference});"
      " choose another output or delete it"
    )
  assert kit.contents(kit.folder / "data") == before


def test_other_files_are_refused(kit):
  folder = kit.folder / "text"
  folder.mkdir()
  kit.jsonl("text/a.jsonl", kit.texts(30, seed=1))
  data = kit.config({"mine": dict(path=str(folder), language="en")})
  kit.prepare(data)
  hint = "(config.data.sources.mine); choose another output or delete it"
  kit.jsonl("text/b.jsonl", ["a new text"])
  assert kit.refusal(data) == (
    f"{kit.folder / 'data'} was prepared without {folder / 'b.jsonl'} {hint}"
  )
  (folder / "b.jsonl").unlink()
  kit.jsonl("text/a.jsonl", kit.texts(31, seed=1))
  assert kit.refusal(data) == (
    f"{kit.folder / 'data'} was prepared from another version of"
    f" {folder / 'a.jsonl'} {hint}"
  )
  # The text may be moved away once it is prepared.
  shutil.rmtree(folder)
  kit.prepare(data)
  assert kit.messages == [f"{kit.folder / 'data'} is prepared"]


def test_a_given_tokenizer_is_used_and_must_stay(kit, sources):
  given = Tokenizer.train(
    kit.texts(50, seed=5), vocab_size=320, end_of_text="<end>", field="x"
  )
  path = kit.folder / "given.json"
  given.save(path)
  fields = dict(tokenizer=dict(path=str(path), end_of_text="<end>"))
  config = kit.config(sources, **fields)
  data = kit.prepare(config)
  assert data.tokenizer().digest == given.digest
  assert not any("training" in message for message in kit.messages)
  assert sorted(kit.documents(data, "a")) == sorted(kit.texts(30, seed=1))
  kit.prepare(config)
  assert kit.messages == [f"{kit.folder / 'data'} is prepared"]
  other = Tokenizer.train(
    kit.texts(50, seed=6), vocab_size=320, end_of_text="<end>", field="x"
  )
  other.save(path)
  assert kit.refusal(config) == (
    f"{kit.folder / 'data'} was prepared with another version of {path}"
    " (config.data.tokenizer.path); choose another output or delete it"
  )
  path.unlink()
  kit.prepare(config)
  assert kit.messages == [f"{kit.folder / 'data'} is prepared"]


class _Killed(BaseException):
  """What no handler of the package expects."""


def _assert_untouched(kit, inputs: dict[str, bytes]):
  """Neither a result nor a part of one is left beside the inputs."""
  assert kit.contents(kit.folder) == inputs
  assert not [path for path in kit.folder.iterdir() if path.is_dir()]


def test_a_run_that_is_killed_leaves_nothing(kit, sources):
  """Killed at every message in turn, and then run to the end."""
  config, inputs = kit.config(sources), kit.contents(kit.folder)
  for kill_at in range(9):
    said = []

    def progress(message: str, kill_at=kill_at, said=said) -> None:
      said.append(message)
      if len(said) == kill_at + 1:
        raise _Killed(message)

    with pytest.raises(_Killed):
      prepare_lib.prepare(config, kit.folder / "data", progress=progress)
    assert len(said) == kill_at + 1
    _assert_untouched(kit, inputs)
  data = kit.prepare(config)
  # Nine messages and the one that it is done, as in an unbroken run.
  assert len(kit.messages) == 10
  assert sorted(kit.documents(data, "a")) == sorted(kit.texts(30, seed=1))


@pytest.mark.parametrize("call", [1, 4, 6])
def test_a_full_disk_leaves_nothing(kit, sources, monkeypatch, call):
  """The `call`-th of the six stores cannot be written."""
  inputs = kit.contents(kit.folder)
  finish, calls = token_store.StoreWriter.finish, []

  def failing(writer):
    calls.append(writer)
    if len(calls) == call:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return finish(writer)

  monkeypatch.setattr(token_store.StoreWriter, "finish", failing)
  with pytest.raises(OSError):
    kit.prepare(kit.config(sources))
  _assert_untouched(kit, inputs)


def test_what_a_killed_process_left_is_removed(kit, sources):
  """One that had no time to clean up behind itself."""
  partial = kit.folder / ".data.partial"
  (partial / "spools").mkdir(parents=True)
  (partial / "dataset.json").write_text("{}")
  data = kit.prepare(kit.config(sources))
  assert not partial.exists()
  assert sorted(kit.documents(data, "a")) == sorted(kit.texts(30, seed=1))
  assert not (kit.folder / "data" / "spools").exists()


def test_a_place_that_is_taken_is_refused(kit, sources):
  config, target = kit.config(sources), kit.folder / "data"
  taken = f"{target} exists and is not prepared data; choose another output"
  target.write_text("a file")
  assert kit.refusal(config) == taken
  assert target.read_text() == "a file"
  target.unlink()
  target.mkdir()
  (target / "file").write_text("")
  assert kit.refusal(config) == taken
  assert [path.name for path in target.iterdir()] == ["file"]
  # An empty directory is no obstacle.
  (target / "file").unlink()
  assert kit.prepare(config).path == target


def test_a_place_that_cannot_be_made_is_named(kit, sources):
  (kit.folder / "file").write_text("")
  assert kit.refusal(kit.config(sources), name="file/data") == (
    f"output='{kit.folder}/file/data': cannot be made: Not a directory"
  )


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "天"])
def test_a_source_whose_name_is_no_folder_is_refused(kit, sources, name):
  assert kit.refusal(kit.config({name: sources["a"]})) == (
    f"config.data.sources: the name {name!r} becomes a folder; expected"
    " letters, digits, '_', '-' and '.'"
  )
  assert not (kit.folder / "data").exists()
