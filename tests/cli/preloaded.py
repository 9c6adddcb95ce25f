"""Imports the package but for its commands, whose flags are their own."""

from __future__ import annotations

import importlib
import pathlib

import aquila_jax.cli.app  # noqa: F401

_PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "aquila_jax"

for _path in sorted(_PACKAGE.rglob("*.py")):
  _parts = _path.relative_to(_PACKAGE.parent).with_suffix("").parts
  # What the optional packages are for is imported where they are.
  if "cli" not in _parts and not _parts[-1].startswith("harness"):
    importlib.import_module(".".join(_parts))
