"""The resolved text of a shipped config, as the golden files have it."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from aquila_jax.core import config
from aquila_jax.core.experiment_config import ExperimentConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "experiments" / "configs"
GOLDEN = ROOT / "tests" / "golden" / "configs"


def names() -> list[str]:
  """The shipped configs."""
  return sorted(path.stem for path in CONFIGS.glob("*.py"))


def load(name: str) -> ConfigDict:
  """What the config file's get_config() gives."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def experiment(name: str) -> ExperimentConfig:
  """The config through the door: validated, with every default."""
  return config.build(ExperimentConfig, load(name).to_dict())


def text(name: str) -> str:
  """One `field = value` a line, every field of the resolved config."""
  resolved = config.to_dict(experiment(name))
  return "".join(f"{line}\n" for line in _lines(resolved, ""))


def _lines(node: Any, path: str) -> Iterator[str]:
  if isinstance(node, dict) and node:
    for key, value in node.items():
      yield from _lines(value, f"{path}.{key}" if path else key)
  else:
    yield f"{path} = {node!r}"
