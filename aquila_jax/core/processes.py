"""Several processes as one: what each does, what they tell each other.

Every function here is for all processes of a job to call in the same order,
from their main threads; in a process on its own they cost nothing. What is told
goes through jax's coordination service, which process 0 holds, and through no
device.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # its client is not public; Orbax uses it too
from jax.sharding import NamedSharding, PartitionSpec

from aquila_jax.core import config
from aquila_jax.core.errors import UserError

_KEYS = "aquila_jax"
# A process that waits is ended when another is lost (process_watch.py), so the
# limit is only there because there must be one.
_FOREVER_MS = 2**31 - 1
# Of what process 0 tells, in order. A process has one job at most.
_numbers = itertools.count()

T = TypeVar("T")


def index() -> int:
  """Of this process; no device is touched to find it."""
  return distributed.global_state.process_id


def count() -> int:
  return distributed.global_state.num_processes


def is_first() -> bool:
  """Whether this process writes, logs and reports: the first, or the only."""
  return index() == 0


def are_several() -> bool:
  return count() > 1


def client() -> Any:
  """Of the coordination service."""
  found = distributed.global_state.client
  assert found is not None, "jax.distributed is not initialized"
  return found


def barrier(name: str) -> None:
  """Returns when all processes are here.

  Args:
    name: for whoever looks where they wait; it may repeat, and is the same in
      all processes.
  """
  if are_several():
    client().wait_at_barrier(_key("barrier", name), _FOREVER_MS)


def from_first(make: Callable[[], T], *, name: str) -> T:
  """What process 0 makes, in all of them.

  Where it raises, its job ends (process_watch.py), so the others do too.

  Args:
    make: called in process 0 only; its result must be plain JSON.
    name: as of `barrier`; the same in all processes, so of no path.

  Returns:
    The result; in several processes, as JSON gives it back.
  """
  if not are_several():
    return make()
  key = _key("said", name)
  if is_first():
    text = json.dumps(make())
    client().key_value_set(key, text)
  else:
    text = client().blocking_key_value_get(key, _FOREVER_MS)
  return json.loads(text)


def check_equal(settings: Mapping[str, Any]) -> None:
  """Refuses processes that were started with different commands.

  They would train replicas of different models, or wait for each other forever.

  Args:
    settings: name -> value or tree of values, plain JSON, the same names in all
      processes.

  Raises:
    UserError: in all of them, naming the first that differs.
  """
  if not are_several():
    return
  mine, key = json.loads(json.dumps(settings)), _key("settings", "all")
  client().key_value_set(f"{key}/{index()}", json.dumps(mine))

  def first_difference() -> str:
    for other in range(1, count()):
      said = client().blocking_key_value_get(f"{key}/{other}", _FOREVER_MS)
      theirs = json.loads(said)
      for name in mine:
        for path, *values in config.changes(mine[name], theirs[name], name):
          here, there = map(json.dumps, values)
          return (
            f"{path}: process 0 has {here}, process {other} has {there}; all"
            " need the same command"
          )
    return ""

  message = from_first(first_difference, name="settings")
  if message:
    raise UserError(message)


def by_first(act: Callable[[], object], *, name: str) -> None:
  """Process 0 does it; all go on when it is done."""
  if is_first():
    act()
  barrier(name)


def _key(kind: str, name: str) -> str:
  return f"{_KEYS}/{kind}/{next(_numbers)}/{name}"


def is_spread(array: Any) -> bool:
  """Whether no process has the whole array."""
  return isinstance(array, jax.Array) and not (
    array.is_fully_addressable or array.is_fully_replicated
  )


def fetch(array: Any, *, index: tuple[int, ...] = ()) -> np.ndarray:
  """array[index] in every process, wherever the shards lie.

  Args:
    array: of anything that NumPy takes. What is asked for of one that is spread
      is gathered on the devices of all.
    index: of the leading dimensions; none is the whole array.

  Returns:
    The array, on the host.
  """
  if not is_spread(array):
    whole = np.asarray(array)
    return np.asarray(whole[index]) if index else whole
  everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
  numbers = tuple(np.int32(i) for i in index)
  return np.asarray(jax.jit(_at, out_shardings=everywhere)(array, numbers))


def place(tree: Any, shardings: Any) -> Any:
  """Lays arrays out on devices of all processes.

  Args:
    tree: of arrays that every process has whole and alike, or of arrays that
      lie on the devices of all already.
    shardings: as of `jax.device_put`, a tree of the same structure.

  Returns:
    The tree on the devices.
  """
  if not are_several():
    return jax.device_put(tree, shardings)
  return jax.tree.map(_placed, tree, shardings)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
  # device_put would gather what all processes have, to compare it.
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
      return leaf
    return jax.jit(_same, out_shardings=sharding)(leaf)
  whole = np.asarray(leaf)
  return jax.make_array_from_callback(
    whole.shape, sharding, lambda index: whole[index]
  )


def _same(x: Any) -> Any:
  return x


def _at(x: Any, index: tuple[Any, ...]) -> Any:
  return x[index]
