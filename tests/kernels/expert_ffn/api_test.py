"""The choice of a backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn import api
from tests.kernels.expert_ffn import contract


@pytest.mark.parametrize(
  ("platform", "devices", "dtype", "name"),
  [
    ("cpu", 8, "float64", "cpu_loop"),
    ("gpu", 1, "bfloat16", "pallas_gpu"),
    ("gpu", 2, "bfloat16", "xla"),
    ("tpu", 1, "bfloat16", "pallas_tpu"),
    ("tpu", 1, "float16", "xla"),
    ("tpu", 4, "bfloat16", "xla"),
  ],
)
def test_each_platform_has_its_own(monkeypatch, platform, devices, dtype, name):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  assert api.platform_default(jnp.dtype(dtype)) == name


def test_none_is_that_of_this_platform():
  rows, kernels, block_expert, used = contract.inputs()
  blocks = dict(block_expert=block_expert, num_blocks=used)
  default, loop = (
    jax.jit(api.expert_ffn, static_argnames="implementation")(
      rows, kernels, implementation=name, **blocks
    )
    for name in (None, api.platform_default())
  )
  np.testing.assert_array_equal(default, loop)


def test_unknown_backend_is_refused():
  rows, kernels, block_expert, used = contract.inputs()
  jitted: Any = api.expert_ffn
  with pytest.raises(NotImplementedError) as error:
    jitted.__wrapped__(
      rows,
      kernels,
      block_expert=block_expert,
      num_blocks=used,
      implementation="triton",
    )
  assert str(error.value) == (
    "implementation='triton'; there are xla, ragged_dot, cpu_loop, pallas_gpu,"
    " pallas_tpu"
  )
