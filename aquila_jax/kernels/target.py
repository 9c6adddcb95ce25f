"""What a program is being compiled for, by which kernels are chosen."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

import jax
from absl import logging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """A kind of device."""

  platform: str  # cpu, gpu or tpu
  device_kind: str  # as jax.Device.device_kind


_elsewhere: contextvars.ContextVar[Target | None] = contextvars.ContextVar(
  "target", default=None
)


def target() -> Target:
  """The devices of this process, or those of `compiling_for`."""
  elsewhere = _elsewhere.get()
  if elsewhere is not None:
    return elsewhere
  return Target(
    platform=jax.default_backend(), device_kind=jax.devices()[0].device_kind
  )


@contextlib.contextmanager
def compiling_for(there: Target) -> Iterator[None]:
  """What is traced within is for such devices, which need not be here."""
  token = _elsewhere.set(there)
  try:
    yield
  finally:
    _elsewhere.reset(token)


def is_whole() -> bool:
  """Whether arrays are those of one device: there is one, or in shard_map.

  Elsewhere the compiler divides them, which it can't do to a kernel's.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count() == 1
  return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


@functools.cache
def say_once(message: str) -> None:
  """A line of the log, of what was chosen: the first time only."""
  logging.info(message)


def num_cores(device_kind: str) -> int:
  """Cores that one device of JAX consists of."""
  return 2 if device_kind in ("TPU v4", "TPU v5", "TPU v5p") else 1
