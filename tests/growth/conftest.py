"""Exactness is tested in float64."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield
