"""glibc keeps what it is told to keep."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Page faults of a second block of 64 MiB, after the first was freed.
_PROGRAM = """
import ctypes, resource, sys
from aquila_jax.core.allocator import keep_freed_memory, release_freed_memory
if sys.argv[1] != "leave":
  assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(2**26)
  ctypes.memset(block, 1, 2**26)
  libc.free(block)
  if sys.argv[1] == "release":
    assert release_freed_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc"
)
def test_a_block_that_was_freed_is_used_again():
  def faults(choice: str) -> int:
    done = subprocess.run(
      [sys.executable, "-c", _PROGRAM, choice],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    )
    return int(done.stdout)

  # Pages have 4 KiB or, where the system gives larger ones, 2 MiB.
  assert faults("keep") < 16
  assert faults("leave") >= 32
  assert faults("release") >= 32
