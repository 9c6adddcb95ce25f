"""How the tokens of a row lie on N devices that share it.

A row is cut into 2N chunks of tokens, and device d has the chunks d and
2N - 1 - d. The later a token, the more it sees: so every device has as much to
do under a causal mask, where a device with the last N-th would have nearly
twice its part (Llama 3, arXiv 2407.21783, section 3.3.2, cuts rows like this).

A device's tokens are in the order of the row, and a row's first device begins
with the row's first token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def chunks(parts: int) -> list[int]:
  """The numbers of all chunks, device by device."""
  last = 2 * parts - 1
  return [chunk for device in range(parts) for chunk in (device, last - device)]


def token_order(length: int, parts: int) -> Int[np.ndarray, "T"]:
  """Which token of the row each one is, device by device.

  Args:
    length: T, a multiple of 2 * `parts`.
    parts: devices.

  Returns:
    Numbers 0 .. T - 1.
  """
  tokens = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
  return tokens[chunks(parts)].reshape(-1)


def divides(length: int, parts: int) -> bool:
  """Whether rows of `length` tokens can lie on so many devices; on one, any."""
  return parts == 1 or length % (2 * parts) == 0


def gathered(
  x: Shaped[Array, "B t *rest"], axis: str
) -> Shaped[Array, "B T *rest"]:
  """All tokens of the rows that a device has a part of, in shard_map.

  Args:
    x: of this device's tokens, or of anything else in two chunks a row.
    axis: of the mesh, that the tokens are divided over.

  Returns:
    Those of all devices along the axis, in the order of the row.
  """
  found = jax.lax.all_gather(x, axis)
  # (N, B, t, ...) -> (N, B, 2, t / 2, ...)
  found = found.reshape(*found.shape[:2], 2, -1, *x.shape[2:])
  every = jnp.concatenate([found[:, :, 0], found[::-1, :, 1]])
  # (2N, B, t / 2, ...) -> (B, 2N, t / 2, ...) -> (B, T, ...)
  return every.swapaxes(0, 1).reshape(x.shape[0], -1, *x.shape[2:])
