"""What one process decides by its clock or a signal, all do at the same step.

Every step each process puts its wishes on its devices, and a tiny program takes
the largest of them. The result is read two steps later, when it is there: no
process waits for another. What is read at a step is the same in all.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import processes

# Steps between a wish and what is made of it. The loop waits for the step
# before the last anyway (recorder.py).
_LAG = 2


@dataclasses.dataclass(frozen=True)
class Wishes:
  """What is to be done at a step."""

  stop: int | None  # by the signal of this number
  save: bool  # since the time for it has come


class Agreement:
  """Makes the wishes of all processes one.

  Args:
    mesh: of the devices of all.
  """

  def __init__(self, mesh: Mesh):
    self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._shape = (mesh.size, 2)
    self._largest = jax.jit(
      lambda told: told.max(0),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    self._pending: collections.deque[Any] = collections.deque()

  def reached(self, wishes: Wishes, *, at_the_end: bool) -> Wishes:
    """What all processes do now. They call it at the same steps.

    Args:
      wishes: of this process, now.
      at_the_end: of the last step, which does not wait for a later one.

    Returns:
      The wishes of some steps ago; at the end, those of now too. Of a process
      on its own, its wishes.
    """
    if not processes.are_several():
      return wishes
    mine = np.asarray([[wishes.stop or 0, wishes.save]], np.int32)
    told = jax.make_array_from_callback(
      self._shape, self._rows, lambda index: mine
    )
    self._pending.append(self._largest(told))
    stop, save = 0, 0
    while self._pending and (at_the_end or len(self._pending) > _LAG):
      found = np.asarray(self._pending.popleft())
      stop, save = max(stop, int(found[0])), max(save, int(found[1]))
    return Wishes(stop=stop or None, save=bool(save))
