"""The smoke config, and a MODEL of its first stage that nobody has trained."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquila_jax.cli import config_door
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel, load_model, save_model
from aquila_jax.core.moments import AdamMoments
from aquila_jax.models import decoder_lm
from tests.cli.commands import ROOT

COUNT = 7  # updates of Adam so far


@functools.cache
def experiment() -> ExperimentConfig:
  """Of experiments/configs/smoke.py."""
  return config_door.load_file(str(ROOT / "experiments/configs/smoke.py"))


def dense_config() -> ModelConfig:
  # Large weights, so that the logits differ by far more than rounding.
  return dataclasses.replace(experiment().stages["dense"].model, init_std=0.4)


def untrained(config: ModelConfig, tokenizer: str | None) -> StoredModel:
  """Random parameters, no moments."""
  init = jax.jit(functools.partial(decoder_lm.init_params, config))
  params = init(key=jax.random.key(5))
  return StoredModel(
    config=config, lineage=Lineage(), params=params, tokenizer=tokenizer
  )


def stored(tokenizer: str | None) -> StoredModel:
  """A dense model with moments of no meaning."""
  model = untrained(dense_config(), tokenizer)
  event = Event(kind="train", name="dense", steps=COUNT, tokens=3584)
  return dataclasses.replace(
    model,
    lineage=Lineage(events=(event,)),
    moments=AdamMoments(
      count=jnp.asarray(COUNT, jnp.int32),
      mu=jax.tree.map(lambda leaf: leaf / 1000, model.params),
      nu=jax.tree.map(lambda leaf: jnp.square(leaf) / 1000, model.params),
    ),
  )


def save(path: pathlib.Path, model: StoredModel) -> None:
  save_model(path, model, axes=decoder_lm.parameter_axes(model.config))


def load(path: pathlib.Path) -> StoredModel:
  return load_model(path, like=decoder_lm.abstract_params)


def damaged_copy(model: pathlib.Path, to: pathlib.Path) -> None:
  """A copy of a MODEL with one bit flipped in its table of embeddings."""
  shutil.copytree(model, to)
  chunks = (to / "params" / "embedding.table" / "c").rglob("*")
  chunk = next(path for path in chunks if path.is_file())
  damaged = bytearray(chunk.read_bytes())
  damaged[1] ^= 4
  chunk.write_bytes(bytes(damaged))


def assert_same(found: Any, expected: Any) -> None:
  """Bit for bit: trees of arrays."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
