"""Whether this process is one of several, and where the first of them is.

Read from flags, from the variables of `VARIABLES`, and from what jax finds of a
cluster (TPU pod, GKE, SLURM, Open MPI); nothing is connected to yet.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Any

# Not public, and only read: so that we find the cluster that
# jax.distributed.initialize would, and can leave one process alone.
from jax._src.clusters import ClusterEnv

from aquila_jax.core import errors

# The variable that stands for each flag.
VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """One of several processes."""

  coordinator: str  # HOST:PORT, on which process 0 listens
  num_processes: int
  process_id: int
  # Of jax's cluster environments; "" where all was given.
  cluster: str = ""

  @property
  def is_first(self) -> bool:
    return self.process_id == 0

  @property
  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def find_settings(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_s: float = 300.0,
) -> Settings | None:
  """What flags, variables and the cluster say together.

  Args:
    coordinator: of the flag; None where it is not given.
    num_processes: likewise; 1 is one process, whatever the cluster says.
    process_id: likewise.
    timeout_s: how long to wait for the name of a cluster's first host.

  Returns:
    The settings; None for a process on its own.

  Raises:
    errors.UserError: where they contradict each other, or are not whole.
  """
  given = {
    "coordinator": _value("coordinator", coordinator, os.environ),
    "num_processes": _number("num_processes", num_processes, os.environ),
    "process_id": _number("process_id", process_id, os.environ),
  }
  _check(given)
  if given["num_processes"] == 1:
    return None
  missing = [name for name, value in given.items() if value is None]
  cluster = _cluster() if missing else None
  if len(missing) == len(given) and cluster is None:
    return None
  if missing and cluster is None:
    have = [f"--{name}={v}" for name, v in given.items() if v is not None]
    lack = [f"--{name} ({VARIABLES[name]})" for name in missing]
    raise errors.UserError(
      f"{' '.join(have)}: {' and '.join(lack)} must be given too, since no"
      " cluster was found that says it"
    )
  if cluster is not None:
    given |= _of_cluster(cluster, given, timeout_s=timeout_s)
    if given["num_processes"] == 1:
      return None
    _check(given)
  return Settings(cluster=cluster.name if cluster else "", **given)


def _value(name: str, flag: Any, environment: Mapping[str, str]) -> str | None:
  """A flag, or the variable that stands for it."""
  variable = environment.get(VARIABLES[name]) or None
  if flag is None:
    return variable
  if variable is not None and variable != str(flag):
    raise errors.UserError(
      f"--{name}={flag} contradicts the environment, {VARIABLES[name]}="
      f"{variable}; give one of them"
    )
  return str(flag)


def _number(
  name: str, flag: int | None, environment: Mapping[str, str]
) -> int | None:
  text = _value(name, flag, environment)
  if text is None:
    return None
  try:
    return int(text)
  except ValueError as error:
    raise errors.UserError(
      f"{VARIABLES[name]}={text}: expected a number"
    ) from error


def _check(given: Mapping[str, Any]) -> None:
  """What can be refused of the values that there are."""
  coordinator, count, index = (
    given[name] for name in ("coordinator", "num_processes", "process_id")
  )
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise errors.UserError(
        f"--coordinator={coordinator}: expected HOST:PORT, of process 0"
      )
  if count is not None and count < 1:
    raise errors.UserError(f"--num_processes={count}: expected at least 1")
  if index is not None and not 0 <= index < (count or index + 1):
    raise errors.UserError(
      f"--process_id={index}: expected 0 to {(count or 1) - 1}, one of"
      f" --num_processes={count}"
    )


def _cluster() -> type[ClusterEnv] | None:
  """The cluster that this process is in, as jax finds it."""
  with warnings.catch_warnings():
    # Of Kubernetes without its package, where nothing need be found.
    warnings.simplefilter("ignore")
    for kind in ClusterEnv._cluster_types:
      if not kind.opt_in_only_method and kind.is_env_present():
        return kind
  return None


def _of_cluster(
  cluster: type[ClusterEnv], given: Mapping[str, Any], *, timeout_s: float
) -> dict[str, Any]:
  """What the cluster says of the values that are not given."""
  found = {}
  try:
    if given["num_processes"] is None:
      found["num_processes"] = cluster.get_process_count()
      if found["num_processes"] == 1:
        return found
    if given["process_id"] is None:
      found["process_id"] = cluster.get_process_id()
    if given["coordinator"] is None:
      found["coordinator"] = cluster.get_coordinator_address(
        timeout_secs=int(timeout_s),
        override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
      )
  except (RuntimeError, ValueError, KeyError, OSError) as error:
    raise errors.UserError(
      f"jax found the cluster {cluster.name!r}, but not its processes"
      f" ({type(error).__name__}: {error}); give --coordinator, --num_processes"
      " and --process_id, or --num_processes=1"
    ) from error
  return found
