"""What a step holds: by hand on a small one, and as the step is laid out."""

from __future__ import annotations

import dataclasses

import pytest

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  MeshConfig,
  OptimizerConfig,
  TrainConfig,
)
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.pipeline.planned import bytes_of_device
from aquila_jax.planning.step_memory import Step, leaves
from aquila_jax.sharding.mesh import abstract_mesh
from aquila_jax.training.program import make_program

MODEL = ModelConfig(
  vocab_size=101,
  num_layers=2,
  embed_dim=8,
  mlp_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  context_length=8,
  qkv_bias=False,
  remat="full",
)
EXPERTS = MoeConfig(num_experts=4, top_k=2, block_size=4)
MIXTURE = dataclasses.replace(MODEL, moe=EXPERTS)
TRAIN = TrainConfig(
  batch_size=8,
  sequence_length=8,
  steps=10,
  num_microbatches=2,
  optimizer=OptimizerConfig(learning_rate=1e-3),
)


def _step(model: ModelConfig, **sizes) -> Step:
  devices = 1
  for size in sizes.values():
    devices *= size
  config = MeshConfig(**(dict(data=1) | sizes))
  mesh = abstract_mesh(config, num_devices=devices)
  return Step(model=model, train=TRAIN, mesh=mesh)


def test_a_dense_step_by_hand():
  step = _step(MODEL, fsdp=2)
  # 8 rows of 8 tokens, over two devices, in two parts.
  assert step.tokens == 16
  # A layer has 8 * 8 + 2 * 8 * 4 + 8 * 8 of attention, 3 * 8 * 16 of the FFN,
  # two norms of 8; table and head 101 * 8 each, and a norm. Halved.
  numbers = (2 * (192 + 384 + 16) + 2 * 808 + 8) // 2
  state = step.state()
  assert state.parameters == 4 * numbers
  assert state.optimizer == 8 * numbers + 4
  # Six numbers a token, and the step.
  assert state.batch == 6 * 4 * 32 + 4
  found = step.temporaries()
  assert found.copies == 2 * numbers
  assert found.sums == found.gradients == 4 * numbers
  # What enters either layer, in bfloat16.
  assert found.saved == 2 * 16 * 8 * 2
  # The head, whole, and logits in float32 and bfloat16.
  assert found.loss == 8 * 101 * 2 + 16 * 101 * 6
  # Kernels, four of hidden units; sums of a row, six of the width.
  assert (
    found.layer == 3 * 256 + 4 * 16 * 16 * 2 + 16 * 2 * 512 + 6 * 16 * 8 * 2
  )
  assert found.total == found.copies + found.saved + found.sums + max(
    found.loss, found.gradients + found.layer
  )
  assert step.total == (
    state.parameters + state.optimizer + state.batch + found.total
  )


def test_products_are_kept_by_their_policy():
  dots = dataclasses.replace(MODEL, remat="dots")
  kept = _step(dots, fsdp=2).temporaries().saved
  # The entry, queries, keys, values, what attention gives; gate and up.
  assert kept == 2 * 16 * 2 * (8 + 8 + 4 + 4 + 8 + 16 + 16)


@pytest.mark.parametrize(
  ("model", "sizes"),
  [
    (MODEL, dict(fsdp=4)),
    (MODEL, dict(data=2, fsdp=2)),
    (MODEL, dict(fsdp=2, expert=2)),
    (MIXTURE, dict(fsdp=2, expert=2)),
    (dataclasses.replace(MIXTURE, tied_embeddings=True), dict(fsdp=4)),
    (dataclasses.replace(MODEL, num_kv_heads=2), dict(fsdp=2, tensor=2)),
    (dataclasses.replace(MODEL, param_dtype="bfloat16"), dict(fsdp=2)),
  ],
)
def test_the_state_is_that_of_the_step(model, sizes):
  step = _step(model, **sizes)
  program = make_program(model, TRAIN, mesh=step.mesh, total_steps=10)
  state = step.state()
  assert state.parameters == bytes_of_device(program.state.params)
  assert state.optimizer == bytes_of_device(program.state.opt_state)
  both = bytes_of_device(program.state) + bytes_of_device(program.batch)
  assert state.parameters + state.optimizer + state.batch == both


def test_experts_are_divided_and_have_room_for_more_rows():
  whole, divided = _step(MIXTURE, fsdp=4), _step(MIXTURE, fsdp=2, expert=2)
  assert whole.tokens == divided.tokens == 8
  # 16 assignments, and blocks of 4 that four experts leave a part of empty.
  assert whole.rows() == 16 + 4 * 3
  # Half as many again, of two experts.
  assert divided.rows() == 24 + 2 * 3
  # Of whose slots two thirds are filled, but for those of blocks.
  assert (whole.filled, divided.filled) == (1.0, 16 / 30)
  kernel = 4 * 8 * 16 * 2
  saved = whole.temporaries().layer - divided.temporaries().layer
  # Two and their gradients, and a copy as two rows of a device fill no tile;
  # of half the experts all three and theirs. Rows that are moved are there
  # twice, and twice more where they are weighed.
  assert saved == (
    5 * kernel
    - 6 * kernel / 2
    + 28 * (3 * 16 * 2 + 4 * 8 * 2)
    - 30 * (3 * 16 * 2 + 2 * 8 * 2)
  )


def test_rows_that_fill_no_tile_are_copied():
  # Of 8 rows, four on a device.
  ffn = [leaf for leaf in leaves(MODEL) if leaf.axes.has("mlp")]
  mesh = _step(MODEL, fsdp=2).mesh
  copied = [leaf.is_copied(mesh) for leaf in ffn]
  # Down has eight of sixteen.
  assert sorted(copied) == [False, True, True]
  assert not any(leaf.is_copied(_step(MODEL, fsdp=1).mesh) for leaf in ffn)


def test_a_size_that_is_not_divided_is_refused():
  with pytest.raises(errors.UserError, match=r"config\.mesh\.fsdp=3"):
    _step(MODEL, fsdp=3).state()
