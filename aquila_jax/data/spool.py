"""Texts on disk while they are being prepared, in the order they were read."""

from __future__ import annotations

import array
import pathlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from aquila_jax.data import cleaning


class Spool:
  """An append-only file of texts with random access.

  In memory a text is 16 bytes, whatever its length.

  Args:
    path: the file, made here.
  """

  def __init__(self, path: pathlib.Path):
    self._file = path.open("w+b")
    self._offsets = array.array("q", [0])
    self._positions = array.array("d")

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: int) -> str:
    start, stop = self._offsets[index], self._offsets[index + 1]
    self._file.seek(start)
    return self._file.read(stop - start).decode()

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))

  def append(self, text: str) -> int:
    """Adds a text; returns its length in bytes."""
    raw = text.encode()
    self._file.seek(self._offsets[-1])
    self._file.write(raw)
    self._offsets.append(self._offsets[-1] + len(raw))
    self._positions.append(cleaning.position(text))
    return len(raw)

  @property
  def bytes(self) -> Int[np.ndarray, " docs"]:
    """The UTF-8 length of every text."""
    return np.diff(np.array(self._offsets, np.int64))

  @property
  def positions(self) -> Float[np.ndarray, " docs"]:
    """`cleaning.position` of every text."""
    return np.array(self._positions, np.float64)

  def close(self) -> None:
    """Closes the file; it is not deleted."""
    self._file.close()
