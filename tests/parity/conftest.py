"""Collects what the parity tests measured, for docs/parity.md.

Nothing here imports torch: pytest reads this file also in `make test`.
"""

from __future__ import annotations

import pathlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--records",
    default="",
    help="a file that gets a line of JSON for every comparison",
  )


@pytest.fixture(scope="session")
def records(request) -> pathlib.Path | None:
  """Where `checking.record` appends to; workers of pytest-xdist share it."""
  path = request.config.getoption("--records")
  return pathlib.Path(path).absolute() if path else None
