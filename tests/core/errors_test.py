"""Messages that name the nearest valid name."""

from __future__ import annotations

import pytest

from aquila_jax.core import errors


@pytest.mark.parametrize(
  ("name", "valid", "message"),
  [
    ("shedule", ["schedule", "steps"], "did you mean 'schedule'?"),
    ("xyz", ["b", "a"], "valid: a, b"),
    ("xyz", [], "there is none"),
  ],
)
def test_nearest(name, valid, message):
  assert errors.nearest(name, valid) == message


def test_unknown_name():
  error = errors.unknown_name("--method", "fpy", ["fpi", "aki_pro"])
  assert isinstance(error, errors.UserError)
  assert str(error) == "--method='fpy' is unknown; did you mean 'fpi'?"
