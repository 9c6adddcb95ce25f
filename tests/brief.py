"""XLA told to be brief, before jax is imported.

Nearly all the time of the tests is compilation of programs that run for
microseconds. What such a program computes is another matter only of roundings.
"""

from __future__ import annotations

from importlib import metadata

XLA_FLAGS = " ".join(
  [
    "--xla_backend_optimization_level=0",
    # One piece is compiled for a program, not many: an eighth less time.
    "--xla_cpu_parallel_codegen_split_count=1",
    # A flag that XLA does not know ends the process: a later jaxlib, which may
    # have dropped this one, does without it and takes longer.
    *(
      ["--xla_cpu_use_fusion_emitters=false"]
      if metadata.version("jaxlib").startswith("0.10.")
      else []
    ),
  ]
)


def devices(number: int) -> str:
  """The flag for so many simulated devices."""
  return f"--xla_force_host_platform_device_count={number}"


def with_devices(number: int) -> str:
  """All flags, and so many simulated devices."""
  return f"{XLA_FLAGS} {devices(number)}"
