"""The choice of a backend."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from aquila_jax.kernels.expert_ffn import api
from tests.kernels.expert_ffn import contract


def test_cpu_takes_the_loop():
  rows, kernels, block_expert, used = contract.inputs()
  blocks = dict(block_expert=block_expert, num_blocks=used)
  default, loop = (
    jax.jit(api.expert_ffn, static_argnames="implementation")(
      rows, kernels, implementation=name, **blocks
    )
    for name in (None, "cpu_loop")
  )
  assert jax.default_backend() == "cpu"
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
    "implementation='triton'; there are xla, cpu_loop"
  )
