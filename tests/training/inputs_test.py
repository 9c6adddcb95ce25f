from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training import inputs
from aquila_jax.training.step import abstract_batch


def test_a_placed_batch_is_the_batch_spread_over_the_devices(tiny):
  like = abstract_batch(tiny.config(), mesh=make_mesh(MeshConfig()))
  batch = tiny.batch(1)
  # A loader may use narrower types; the step takes one.
  narrow = batch.replace(tokens=batch.tokens.astype(np.uint16))
  placed = inputs.place(narrow, like=like)
  jax.tree.map(np.testing.assert_array_equal, placed, batch)
  assert placed.tokens.dtype == jnp.int32
  assert placed.tokens.sharding == like.tokens.sharding
  assert placed.tokens.addressable_shards[0].data.shape == (1, 16)


def test_a_batch_must_divide_over_devices_and_microbatches(tiny):
  mesh = make_mesh(MeshConfig())
  config = tiny.config(batch_size=16, num_microbatches=2)
  like = abstract_batch(config, mesh=mesh)
  inputs.check_batch_divides(config, like=like, path="config.train")
  config = tiny.config(batch_size=42, num_microbatches=2)
  with pytest.raises(errors.UserError) as error:
    inputs.check_batch_divides(config, like=like, path="config.train")
  assert str(error.value) == (
    "config.train.batch_size=42: expected a multiple of 16, 2 microbatches"
    " spread over 8 devices; the nearest is 48"
  )


def test_rows_must_divide_over_the_devices_that_share_them(tiny):
  mesh = make_mesh(MeshConfig(data=2, sequence=4))
  for length, is_right in ((16, True), (24, True), (20, False), (3, False)):
    config = tiny.config(sequence_length=length)
    like = abstract_batch(config, mesh=mesh)
    if is_right:
      inputs.check_batch_divides(config, like=like, path="config.train")
      continue
    with pytest.raises(errors.UserError) as error:
      inputs.check_batch_divides(config, like=like, path="config.train")
    nearest = {20: 16, 3: 8}[length]
    assert str(error.value) == (
      f"config.train.sequence_length={length}: expected a multiple of 8, two"
      " chunks for each of config.mesh.sequence=4; the nearest is"
      f" {nearest}"
    )
