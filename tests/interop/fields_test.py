"""Foreign keys: what is used, complained about, and left."""

from __future__ import annotations

import pytest

from aquila_jax.core.errors import UserError
from aquila_jax.interop.fields import Fields, listed


def test_values_of_the_right_type_are_taken():
  fields = Fields(
    {"a": 3, "b": 2, "c": None, "d": [1], "e": {"x": 1}, "f": True}, what="it"
  )
  assert fields.take("a", int) == 3
  assert fields.take("b", float) == 2.0
  assert type(fields.take("b", float)) is float
  assert fields.take("c", str, "default") == "default"
  assert fields.take("missing", int, 7) == 7
  assert fields.take("d", list) == [1]
  assert fields.take("e", dict) == {"x": 1}
  assert fields.take("f", bool) is True
  fields.check()
  assert fields.unknown == []
  assert "c" in fields
  assert not fields.has("c")
  assert fields.has("a")
  assert "missing" not in fields


@pytest.mark.parametrize(
  ("value", "kind", "message"),
  [
    ("3", int, "a='3': expected int"),
    (True, int, "a=True: expected int"),
    (3.0, int, "a=3.0: expected int"),
    (1, bool, "a=1: expected bool"),
    ("x", dict, "a='x': expected dict"),
    ({}, list, "a={}: expected list"),
    (3, str, "a=3: expected str"),
    ([3], float, "a=[3]: expected float"),
    (float("inf"), float, "a=inf: expected a finite number"),
    (float("nan"), float, "a=nan: expected a finite number"),
    (None, list, "a is missing"),
  ],
)
def test_another_value_is_complained_about(value, kind, message):
  fields = Fields({"a": value}, what="it")
  assert type(fields.take("a", kind)) is kind
  with pytest.raises(UserError) as caught:
    fields.check()
  assert str(caught.value) == f"it: {message}"


def test_expected_values_and_unknown_keys():
  fields = Fields({"a": 3, "b": 1, "c": 2, "d": None, "z": 0}, what="it")
  fields.expect("a", 1, 2, why="we have no other")
  fields.expect("b", 1, why="never said")
  fields.expect("d", 1, why="never said")
  fields.expect("e", 1, why="never said")
  fields.ignore("c")
  fields.refuse("and more")
  assert fields.problems == [
    "a=3: expected 1 or 2; we have no other",
    "and more",
  ]
  assert fields.unknown == ["z"]
  with pytest.raises(UserError) as caught:
    fields.check()
  assert str(caught.value) == (
    "it: 2 problems\n  a=3: expected 1 or 2; we have no other\n  and more"
  )


def _fails():
  raise ValueError("need > 0")


def test_what_is_made_of_fields_is_made_of_theirs_only():
  fields = Fields({"a": "x"}, what="it")
  assert fields.make(lambda: 3) == 3
  assert fields.make(_fails) is None
  assert fields.problems == ["need > 0"]
  assert fields.make(lambda: 3) is None
  before = len(fields.problems)
  assert fields.make(lambda: 3, since=before) == 3
  fields.take("a", int)
  assert fields.make(_fails, since=before) is None
  assert fields.problems == ["need > 0", "a='x': expected int"]


def test_long_lists_are_cut_and_counted():
  problems = [str(i) for i in range(45)]
  lines = listed("it", problems).splitlines()
  assert lines[0] == "it: 45 problems"
  assert lines[1:41] == [f"  {i}" for i in range(40)]
  assert lines[41:] == ["  and 5 more"]
