"""SwiGLU experts over blocks of rows: the public call and its backends."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from aquila_jax.kernels.expert_ffn import (
  cpu_loop,
  pallas_gpu,
  pallas_tpu,
  ragged,
  reference,
)
from aquila_jax.kernels.target import is_whole, say_once, target

Implementation = Literal[
  "xla", "ragged_dot", "cpu_loop", "pallas_gpu", "pallas_tpu"
]
_BACKENDS = {
  "xla": reference.expert_ffn,
  "ragged_dot": ragged.expert_ffn,
  "cpu_loop": cpu_loop.expert_ffn,
  "pallas_gpu": pallas_gpu.expert_ffn,
  "pallas_tpu": pallas_tpu.expert_ffn,
}


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: tuple[
    Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
  ],
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  implementation: Implementation | None = None,
) -> Float[Array, "P Q D"]:
  """down(silu(x gate) * (x up)) with the kernels of each block's expert.

  Args:
    rows: P blocks of Q rows; all rows of a block belong to one expert.
    kernels: gate, up and down of all E experts.
    block_expert: the expert of every block, in ascending order.
    num_blocks: how many of the P blocks are in use; they come first. The
      others give zeros.
    implementation: None chooses by platform.

  Returns:
    One output row for each input row.

  Raises:
    NotImplementedError: where `implementation` is not one of the backends.
  """
  name = implementation or platform_default(rows.dtype)
  if name not in _BACKENDS:
    raise NotImplementedError(
      f"implementation={name!r}; there are {', '.join(_BACKENDS)}"
    )
  return _BACKENDS[name](
    rows, kernels, block_expert=block_expert, num_blocks=num_blocks
  )


def platform_default(dtype: DTypeLike = jnp.float32) -> Implementation:
  """The backend that measured best for what is compiled; logged once.

  Of other dtypes than float32 and bfloat16 a TPU takes gathered kernels.

  On a GPU pallas_gpu: of a matmul's rate it gets half, forward and backward,
  where gathered kernels and ragged_dot get a tenth and take many times the
  memory (benchmarks/results/expert_ffn_gpu.json, an H200).

  On a TPU pallas_tpu, by what the compiler schedules, since no TPU was at hand:
  forward and backward, 0.96 of the published rate on v5p and 0.86 on v6e with 8
  experts of 5,632 units, 0.86 and 0.71 with 64 of 704. megablox takes 1.1 to
  1.8 times as long; ragged_dot, whose gradient of kernels is a dense product
  for every expert, 4 times and more (benchmarks/results/expert_ffn_tpu.json).

  A kernel has to have the arrays whole, as on one device or in shard_map;
  elsewhere the compiler divides gathered kernels.
  """
  platform, whole = target().platform, is_whole()
  name: Implementation = "xla"
  if platform == "cpu":
    name = "cpu_loop"
  elif platform == "gpu" and whole:
    name = "pallas_gpu"
  elif platform == "tpu" and whole and dtype in (jnp.float32, jnp.bfloat16):
    name = "pallas_tpu"
  say_once(f"expert_ffn: {name} on {platform}{'' if whole else 's'}")
  return name
