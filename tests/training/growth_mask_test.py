"""The mask's value, step by step, on the host and on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.model_config import GrowthMask
from aquila_jax.training.growth_mask import (
  MaskSchedule,
  mask_schedule,
  trained,
)

MASK = GrowthMask(
  value=0.3, embed_dim=12, mlp_dim=24, num_kv_heads=1, queries_per_kv=2
)


@pytest.mark.parametrize(
  ("start", "steps", "last"),
  # (1 - 0.9) * 10 and 49 * (1 / 49) are not 1 in floating point.
  [(0.0, 4, 4), (0.3, 10, 7), (0.9, 10, 1), (0.0, 49, 49), (1.0, 3, 0)],
)
def test_it_rises_by_one_in_so_many_steps_and_stays(start, steps, last):
  schedule = MaskSchedule(start=start, steps=steps)
  numbers = range(steps + 3)
  values = [schedule.at(step) for step in numbers]
  assert values[0] == start
  assert [value == 1.0 for value in values] == [s >= last for s in numbers]
  np.testing.assert_allclose(
    values, [min(1, start + s / steps) for s in numbers], rtol=1e-12
  )
  # A step on the device has the same value, but for two roundings.
  traced = jax.jit(jax.vmap(schedule.traced))(jnp.arange(steps + 3))
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, values, rtol=2e-7)
  assert [value == 1.0 for value in traced] == [s >= last for s in numbers]


def test_steps_without_a_mask_and_a_mask_without_steps_are_refused(tiny):
  path = "config.stages.s.train"
  for config, mask, message in (
    (
      tiny.config(mask_steps=5),
      None,
      "config.stages.s.train.mask_steps=5: expected 0; the model that the stage"
      " starts from has no growth_mask that could rise",
    ),
    (
      tiny.config(),
      MASK,
      "config.stages.s.train.mask_steps=0: expected at least 1; the model that"
      " the stage starts from has a growth_mask of value 0.3, which training"
      " raises to 1, by 1 in so many steps",
    ),
  ):
    with pytest.raises(errors.UserError) as caught:
      mask_schedule(config, mask, path=path)
    assert str(caught.value) == message
  assert mask_schedule(tiny.config(), None) is None


def test_a_stage_leaves_the_mask_as_high_as_it_rose(tiny):
  model = tiny.model(growth_mask=MASK)
  config = tiny.config(mask_steps=10)

  def after(steps):
    return trained(model, config, steps=steps, path="").growth_mask

  assert after(0) == MASK
  assert after(2) == dataclasses.replace(MASK, value=0.5)
  assert after(7) is None and after(99) is None
  plain = tiny.model()
  assert trained(plain, tiny.config(), steps=3, path="") is plain
