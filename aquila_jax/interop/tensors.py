"""Tensors by name, read one at a time: what an import reads from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """What a file says of a tensor without reading it."""

  shape: tuple[int, ...]
  dtype: str  # the format's own name
  file: str


@runtime_checkable
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
  return not any(map(_count, _pieces(value)))


def count_not_finite(value: np.ndarray) -> int:
  """How many elements are NaN or infinite."""
  return sum(map(_count, _pieces(value)))


def _pieces(value: np.ndarray) -> Iterator[np.ndarray]:
  flat = value.reshape(-1)
  step = 1 << 22
  return (flat[start : start + step] for start in range(0, flat.size, step))


def _count(piece: np.ndarray) -> int:
  if piece.dtype == jnp.bfloat16:
    piece = piece.astype(np.float32)
  return piece.size - int(np.count_nonzero(np.isfinite(piece)))
