"""Training steps on a pod that are compared, and what a program's text says."""

from __future__ import annotations

import dataclasses
from typing import Any

from aquila_jax.core import config as config_lib
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.layers.moe import expert_parallel
from aquila_jax.pipeline.planned import grouped_steps
from aquila_jax.planning import counting, tpu_program
from experiments.configs import aquila_8x16b

TOKENS, ROWS = 4096, 4  # of a row, and rows a chip
# Tiles of the TPU kernels do not depend on blocks; small ones pad little.
_EXPERTS = MoeConfig(num_experts=8, top_k=2, block_size=16)
_MIXTRAL = ModelConfig(
  vocab_size=32000,
  num_layers=32,
  embed_dim=4096,
  mlp_dim=14336,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  context_length=TOKENS,
  rope_theta=1e6,
  qkv_bias=False,
  remat="full",
  compute_dtype="bfloat16",
  moe=_EXPERTS,
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model on a mesh, and MaxText's settings for the same."""

  name: str
  mesh: MeshConfig
  model: ModelConfig
  maxtext: tuple[str, ...] = ()


def cases() -> list[Case]:
  """Three of Mixtral, and ours alone of AquilaMoE-8x16B; of 64 chips."""
  capacity = dataclasses.replace(_EXPERTS, capacity_factor=1.25)
  whole = MeshConfig(data=1, fsdp=64)
  experiment: Any = aquila_8x16b.get_config()
  aquila = config_lib.build(
    ModelConfig, experiment.stages.aquila_8x16b.model.to_dict()
  )
  return [
    Case(
      name="mixtral 8x7b dropless, fsdp 64",
      mesh=whole,
      model=_MIXTRAL,
      maxtext=("ici_fsdp_parallelism=64", "sparse_matmul=true"),
    ),
    Case(
      name="mixtral 8x7b capacity 1.25, fsdp 64",
      mesh=whole,
      model=dataclasses.replace(_MIXTRAL, moe=capacity),
      maxtext=(
        "ici_fsdp_parallelism=64",
        "sparse_matmul=false",
        "megablox=false",
        "capacity_factor=1.25",
      ),
    ),
    Case(
      name="mixtral 8x7b dropless, fsdp 16 x expert 4",
      mesh=MeshConfig(data=1, fsdp=16, expert=4),
      model=_MIXTRAL,
      maxtext=(
        "ici_fsdp_parallelism=16",
        "ici_expert_parallelism=4",
        "sparse_matmul=true",
      ),
    ),
    Case(name="aquila 8x16b dropless, fsdp 64", mesh=whole, model=aquila),
  ]


def steps(model: ModelConfig) -> int:
  """Of a kernel over groups of rows, at most, of all experts."""
  return grouped_steps(model, num_tokens=ROWS * TOKENS)


def row_of(
  case: Case,
  side: str,
  *,
  text: str,
  kernel_cycles: dict[str, int],
  memory: Row,
  coordinates: tpu_program.Coordinates,
  device_kind: str,
) -> Row:
  """What the compiler says of a program.

  Args:
    case: model and mesh.
    side: whose step.
    text: of the compiled program.
    kernel_cycles: of its Pallas kernels.
    memory: of a chip, in bytes.
    coordinates: of the devices on the torus, in the order of the mesh.
    device_kind: of these.

  Returns:
    A row of the table.
  """
  chip = tpu_program.Chip.of(device_kind)
  found = tpu_program.estimate(
    text,
    chip=chip,
    coordinates=coordinates,
    kernel_cycles=kernel_cycles,
    rare=[expert_parallel.OVERFLOW],
  )
  flops = (
    ROWS
    * TOKENS
    * counting.train_flops_per_token(case.model, sequence_length=TOKENS)
  )
  longest = sorted(found.parts, key=lambda part: -part.seconds)[:12]
  return dict(
    case=case.name,
    side=side,
    arguments_gb=memory["arguments"] / 1e9,
    temporaries_gb=memory["temporaries"] / 1e9,
    seconds_without_overlap=found.without_overlap,
    seconds_with_full_overlap=found.with_full_overlap,
    mfu=flops / chip.flops / found.without_overlap,
    compiler_s=found.seconds("estimate"),
    kernels_s=found.seconds("schedule"),
    bytes_s=found.seconds("bytes"),
    links_s=found.seconds("link"),
    collectives={
      name: dict(count=count, gb=size / 1e9, seconds=seconds)
      for name, (count, size, seconds) in found.collectives().items()
    },
    kernels_without_schedule=found.unknown_kernels,
    loops_counted_once=found.unknown_loops,
    longest=[
      dict(
        name=part.name,
        op_name=part.op_name[-80:],
        trips=part.trips,
        seconds=part.seconds,
      )
      for part in longest
    ],
  )
