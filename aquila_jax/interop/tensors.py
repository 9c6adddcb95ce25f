"""Tensors by name, read one at a time: what an import reads from."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """What a file says of a tensor without reading it."""

  shape: tuple[int, ...]
  dtype: str  # the format's own name
  file: str


class TensorSource(Protocol):
  """A checkpoint of named tensors."""

  @property
  def tensors(self) -> dict[str, TensorInfo]:
    """What there is."""
    ...

  def refusal(self, info: TensorInfo) -> str | None:
    """Why a tensor of that type cannot be read, or None."""
    ...

  def read(self, name: str) -> np.ndarray:
    """One tensor, in float32, bfloat16 or float64."""
    ...


def has_only_finite(value: np.ndarray) -> bool:
  """Whether no element is NaN or infinite, without a copy of large arrays."""
  flat = value.reshape(-1)
  step = 1 << 22
  return all(
    bool(np.isfinite(flat[start : start + step].astype(np.float32)).all())
    if value.dtype == jnp.bfloat16
    else bool(np.isfinite(flat[start : start + step]).all())
    for start in range(0, flat.size, step)
  )
