"""Growth, checkpoints and generation on meshes are those of one device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh

from aquila_jax.core.experiment_config import (
  CheckpointConfig,
  MeshConfig,
  ScaleOut,
  ScaleUp,
)
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.types import TrainState
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import generate_tokens
from aquila_jax.growth.scale_out import scale_out
from aquila_jax.growth.scale_up import scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import state as state_lib
from aquila_jax.training.checkpointing import Checkpoints
from tests.growth import tiny

MESHES = [
  MeshConfig(data=8),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=1, expert=8),
  MeshConfig(data=1, sequence=8),
  MeshConfig(data=2, tensor=4),
  MeshConfig(data=2, fsdp=4),
  MeshConfig(data=2, expert=4),
  MeshConfig(data=4, sequence=2),
  MeshConfig(data=1, expert=4, tensor=2),
  MeshConfig(data=1, fsdp=2, expert=4),
  MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
  MeshConfig(data=1, expert=2, sequence=2, tensor=2),
  MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
]
SOURCE = ModelConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=8,
  mlp_dim=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  context_length=32,
  compute_dtype="float32",
)
GROWN = dataclasses.replace(
  SOURCE,
  num_layers=3,
  embed_dim=16,
  mlp_dim=16,
  num_heads=8,
  num_kv_heads=4,
  norm_epsilon=1e-5,
)
MIXTURE = dataclasses.replace(
  GROWN, moe=MoeConfig(num_experts=8, top_k=2, block_size=4)
)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]


def _shardings(config: ModelConfig, mesh: Mesh):
  return param_shardings(
    decoder_lm.parameter_axes(config), decoder_lm.abstract_params(config), mesh
  )


def _grown(shardings: dict[str, Any]) -> tuple[StoredModel, StoredModel]:
  """Scale-Up, and Scale-Out of what it gives."""
  source = tiny.stored(SOURCE)
  up = scale_up(
    source,
    GROWN,
    ScaleUp(source="dense", method="aki"),
    shardings=shardings.get("up"),
  )
  out = scale_out(
    up,
    MIXTURE,
    ScaleOut(source="up", noise=0.1),
    shardings=shardings.get("out"),
  )
  return up, out


@functools.cache
def _on_one_device() -> tuple[StoredModel, StoredModel]:
  return _grown({})


def _generated(model: StoredModel) -> list[tuple[int, ...]]:
  sampling = Sampling(max_new_tokens=6, temperature=0.0)
  found = generate_tokens(
    model.config, model.params, PROMPTS, sampling=sampling
  )
  return [one.tokens for one in found]


def _same(found: Any, expected: Any) -> None:
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    found,
    expected,
  )


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_growth_onto_a_mesh_is_growth(mesh):
  mesh = make_mesh(mesh)
  shardings = {"up": _shardings(GROWN, mesh), "out": _shardings(MIXTURE, mesh)}
  for found, expected, where in zip(
    _grown(shardings), _on_one_device(), shardings.values(), strict=True
  ):
    _same(found.params, expected.params)
    assert found.moments is not None
    assert expected.moments is not None
    _same(found.moments.mu, expected.moments.mu)
    jax.tree.map(
      lambda leaf, sharding: _assert_lies(leaf, sharding),
      found.params,
      where,
    )


def _assert_lies(leaf, sharding) -> None:
  assert leaf.sharding == sharding


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_generation_on_a_mesh_is_generation(mesh):
  """Greedy, from logits that no rounding brings together."""
  _, mixture = _on_one_device()
  params = jax.device_put(mixture.params, _shardings(MIXTURE, make_mesh(mesh)))
  found = _generated(dataclasses.replace(mixture, params=params))
  assert found == _generated_once()


@functools.cache
def _generated_once() -> list[tuple[int, ...]]:
  return _generated(_on_one_device()[1])


def _state(like: TrainState) -> TrainState:
  """Numbers in order, where `like` says."""
  start = itertools.count()

  def fill(leaf):
    numbers = np.arange(leaf.size) + 1000 * next(start)
    return jax.device_put(
      numbers.reshape(leaf.shape).astype(leaf.dtype), leaf.sharding
    )

  return jax.tree.map(fill, like)


def _abstract(mesh: Mesh) -> TrainState:
  return state_lib.abstract_state(
    decoder_lm.abstract_params(MIXTURE),
    optimizer=optax.chain(optax.scale_by_adam()),
    axes=decoder_lm.parameter_axes(MIXTURE),
    mesh=mesh,
    keep_ema=True,
  )


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize(
  ("one", "other"), list(zip(MESHES, MESHES[1:], strict=False)), ids=str
)
def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path, one, other):
  state = _state(_abstract(make_mesh(one)))
  like = _abstract(make_mesh(other))
  directory = epath.Path(tmp_path) / "checkpoints"
  config = {"model": {}, "train": {}}
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    saved.save(1, state=state, progress={}, config=config)
    saved.wait()
    restored, _ = saved.restore(like, config=config)
  _same(restored, state)
  jax.tree.map(lambda a, b: _assert_lies(a, b.sharding), restored, like)
