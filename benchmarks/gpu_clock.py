"""Times on an accelerator, and its two ceilings."""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_SIZE = 8192
_COPIED = 2**31  # elements of two bytes


def seconds(call: Callable[[], Any], *, calls: int, rounds: int) -> float:
  """The median over rounds of the time of one of `calls` queued calls.

  Args:
    call: compiled; it is run once more before.
    calls: are queued before the last is waited for.
    rounds: measurements.

  Returns:
    Seconds a call.
  """
  out = jax.block_until_ready(call())
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(calls):
      out = call()
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / calls)
  return statistics.median(times)


def matmul_flops() -> float:
  """FLOPs a second of a bfloat16 product of 8192^3, on random data."""
  a, b = (
    jax.random.normal(jax.random.key(i), (_SIZE, _SIZE), jnp.bfloat16)
    for i in range(2)
  )
  product = jax.jit(jnp.matmul)
  return 2 * _SIZE**3 / seconds(lambda: product(a, b), calls=20, rounds=5)


def copy_bytes() -> float:
  """Bytes read and written a second by a copy on the device."""
  x = jnp.ones(_COPIED, jnp.bfloat16)
  copy = jax.jit(jnp.negative)
  return 2 * x.nbytes / seconds(lambda: copy(x), calls=5, rounds=5)


def temporaries(compiled: Any) -> float:
  """GiB of temporaries of a compiled function, as XLA states them."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**30


def write_report(path: str | None, *, benchmark: str, **numbers: Any) -> None:
  """Writes the JSON of a benchmark, with date, device and versions."""
  if not path:
    return
  report = dict(
    benchmark=benchmark,
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    device=jax.devices()[0].device_kind,
    versions=dict(python=platform.python_version(), jax=jax.__version__),
    **numbers,
  )
  text = json.dumps(report, indent=1) + "\n"
  pathlib.Path(path).write_text(text, encoding="utf-8")
