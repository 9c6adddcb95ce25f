"""Where a MODEL lies that is read to be grown or laid out."""

from __future__ import annotations

import contextlib
import os

import jax

from aquila_jax.core import errors


def on_host(
  platform: str, *, num_devices: int
) -> contextlib.AbstractContextManager:
  """What is read within lies on the host, where a mesh has several devices.

  Else it would lie on the first of them, whole: AquilaDense-16B, in float32
  with its moments, takes 186 GiB.

  Args:
    platform: of the devices.
    num_devices: of the mesh.

  Returns:
    A context; on a single device, or on CPUs, one that does nothing.

  Raises:
    errors.UserError: where JAX_PLATFORMS leaves the host's CPUs out.
  """
  if num_devices == 1 or platform == "cpu":
    return contextlib.nullcontext()
  try:
    (cpu, *_) = jax.local_devices(backend="cpu")
  except RuntimeError as error:
    given = os.environ.get("JAX_PLATFORMS")
    raise errors.UserError(
      f"JAX_PLATFORMS={given}: a MODEL for a mesh of several devices is read on"
      " the host; expected cpu among them"
    ) from error
  return jax.default_device(cpu)
