"""What machine a benchmark ran on."""

from __future__ import annotations

import os
import pathlib
import platform


def device() -> str:
  """The processor's name, where Linux tells it, and how many cores."""
  name = platform.machine()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
      if line.startswith("model name"):
        name = line.partition(":")[2].strip()
        break
  return f"{name}, {os.cpu_count()} cores"
