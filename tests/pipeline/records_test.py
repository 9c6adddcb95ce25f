"""Records are whole or not there."""

from __future__ import annotations

import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import FreezeConfig
from aquila_jax.pipeline import records


def test_a_record_comes_back_and_leaves_nothing_beside(tmp_path):
  path = epath.Path(tmp_path) / "new" / "a.json"
  records.write(path, {"b": [1, "二"], "c": None})
  records.write(path, {"b": [2], "c": 0.1})
  assert records.read(path) == {"b": [2], "c": 0.1}
  assert [child.name for child in path.parent.iterdir()] == ["a.json"]


def test_there_may_be_none(tmp_path):
  assert records.read(epath.Path(tmp_path) / "a.json") is None


@pytest.mark.parametrize("content", ['{"a": 1', "[1]", ""])
def test_a_damaged_record_is_named(tmp_path, content):
  path = epath.Path(tmp_path) / "a.json"
  path.write_text(content)
  with pytest.raises(errors.UserError) as caught:
    records.read(path)
  assert str(caught.value).startswith(f"{path} is damaged (")
  assert str(caught.value).endswith("); delete it to have it made again")


def test_plain_is_what_json_gives_back():
  plain = records.plain(FreezeConfig(axes=("embed",), layers=(0, 1)))
  assert plain == {"axes": ["embed"], "layers": [0, 1], "new_only": False}
