"""Compilation: the cache on disk, and the step compiled before the loop."""

from __future__ import annotations

import os
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from aquila_jax.kernels.expert_ffn.tpu_tiles import planned, vector_memory
from aquila_jax.kernels.target import target

_CACHE_DIRECTORY = "~/.cache/aquila_jax/xla"


def enable_compilation_cache(directory: str = "") -> epath.Path:
  """Keeps compiled programs on disk, for the next start of the same job.

  Args:
    directory: where; "" is $JAX_COMPILATION_CACHE_DIR, or else
      ~/.cache/aquila_jax/xla.

  Returns:
    The directory.
  """
  chosen = (
    directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or _CACHE_DIRECTORY
  )
  path = epath.Path(chosen).expanduser()
  jax.config.update("jax_compilation_cache_dir", str(path))
  # Programs of small models compile in less than the default of a second, and
  # there are many of them.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  return path


# The compiler for TPUs then fuses steps of a collective into what need not wait
# for it, products and Pallas kernels; unasked it does not.
_OVERLAP = (
  "xla_enable_async_all_gather",
  "xla_tpu_enable_async_collective_fusion",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
  "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
  "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter",
  "xla_tpu_enable_async_collective_fusion_multiple_steps",
  "xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call",
  "xla_tpu_overlap_compute_collective_tc",
)


# Bytes of vector memory beside a kernel's tiles: of 47.5 MiB of tiles on v5p
# the compiler, with a collective in them, made 48.5.
_OF_COLLECTIVE = 2 * 2**20


def overlap_options() -> dict[str, str] | None:
  """What tells the compiler to run collectives beside compute.

  Returns:
    Options of `jax.jit`; None where the platform that is compiled for (see
    kernels/target.py) has none.
  """
  found = target()
  if found.platform != "tpu":
    return None
  # A kernel that a collective is fused into has no limit of its own any more,
  # and the default is a third of what ours are planned with.
  memory = planned(vector_memory(found.device_kind)) + _OF_COLLECTIVE
  limit = {"xla_tpu_scoped_vmem_limit_kib": str(memory // 1024)}
  return dict.fromkeys(_OVERLAP, "true") | limit


def compile_step(jitted: Any, *arguments: Any) -> Any:
  """Compiles a jitted step for abstract arguments and logs what it costs.

  The executable refuses arguments of any other shape, dtype or sharding, so
  the loop cannot recompile unnoticed.

  Args:
    jitted: of `jit_train_step`.
    *arguments: trees of ShapeDtypeStruct with shardings.

  Returns:
    The executable.
  """
  logging.info("compiling the training step")
  start = time.perf_counter()
  executable = jitted.lower(*arguments).compile()
  seconds = time.perf_counter() - start
  logging.info(
    "compiled the training step in %.1f s; %s", seconds, _cost(executable)
  )
  return executable


def _cost(executable: Any) -> str:
  """FLOPs and memory as XLA states them, where the backend does."""
  parts = []
  flops = (executable.cost_analysis() or {}).get("flops")
  if flops:
    # XLA counts the body of a loop once, whatever its trip count: this is one
    # layer of the stack. MFU uses planning's count instead.
    parts.append(f"{flops:.3g} FLOPs (loop bodies once)")
  memory = executable.memory_analysis()
  if memory is not None:
    mib = 2.0**20
    parts.append(
      f"a device: {memory.argument_size_in_bytes / mib:.1f} MiB of arguments,"
      f" {memory.temp_size_in_bytes / mib:.1f} MiB of temporaries"
    )
  return "; ".join(parts) or "the backend states no costs"
