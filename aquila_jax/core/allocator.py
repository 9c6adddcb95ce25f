"""Keeps freed memory in the process, for work that goes through large blocks.

glibc gives every large block back to the system when it is freed, and the next
one is new pages, each of which the system has to clear: reading slices of
117 MB through TensorStore took 0.21 s each on 2 CPU cores, and 0.06 s with
memory that is kept. Resident memory then stays at its peak until it is released
or the process ends.

A training step on a CPU has its temporaries in one such block. Of 30 M
parameters it took 171,000 page faults and 2.3 s of processor time, and none and
2.0 s with memory that is kept (benchmarks/train_step_cpu.py has both).
"""

from __future__ import annotations

import ctypes

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGEST = 2**30


def keep_freed_memory() -> bool:
  """Tells glibc to keep what is freed; elsewhere it does nothing.

  It is for a whole process, so that only commands call it, and as they start:
  what XLA's threads take before has blocks of its own, which are not kept.

  Returns:
    Whether the allocator took it.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return False
  # One arena: those of threads cannot hold large blocks.
  taken = mallopt(_ARENA_MAX, 1) and mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1)
  # Some versions refuse a threshold as large, and can do without mapping.
  return bool(
    taken and (mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_MAX, 0))
  )


def release_freed_memory() -> bool:
  """Gives what is free back to the system, between two steps of a command.

  What one left in pieces would otherwise lie beside what the next one takes.

  Returns:
    Whether there was any, and the allocator gave it back.
  """
  try:
    return bool(ctypes.CDLL(None).malloc_trim(0))
  except (AttributeError, OSError, TypeError):
    return False
