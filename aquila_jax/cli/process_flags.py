"""The flags of a job of several processes, and how a verb becomes one of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from aquila_jax.cli import app
from aquila_jax.core import errors, process_watch, processes
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.core.process_settings import find_settings
from aquila_jax.pipeline import records

_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT on which process 0 of several listens. A TPU pod, GKE, SLURM and"
  " Open MPI are found without it.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Of the job; 1 is a process on its own, wherever."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Of this one, from 0; process 0 writes and reports."
)
_JOIN_TIMEOUT_S = flags.DEFINE_float(
  "join_timeout_s",
  300.0,
  "How long the processes wait for each other.",
  lower_bound=1.0,
)
_LOST_AFTER_S = flags.DEFINE_float(
  "lost_after_s",
  100.0,
  "The silence of a process after which the others end.",
  lower_bound=1.0,
)


def workdir(flag: flags.FlagHolder[Any]) -> epath.Path:
  """What --workdir names.

  Raises:
    errors.UserError: where that is nothing, which would be the current folder.
  """
  if not flag.value:
    raise errors.UserError(f"--{flag.name}=: expected a folder to write to")
  return epath.Path(flag.value).expanduser()


def join(
  experiment: ExperimentConfig, others: Iterable[flags.FlagHolder[Any]]
) -> None:
  """Makes this process one of several, where flags or environment say so.

  To be called before any device is touched, by a verb that all of them run.

  Args:
    experiment: which all of them must have.
    others: flags that all of them must have alike.

  Raises:
    errors.UserError: as `find_settings` and `process_watch.join`, and in all
      processes where their commands differ.
  """
  settings = find_settings(
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    timeout_s=_JOIN_TIMEOUT_S.value,
  )
  if settings is None:
    return
  watch = process_watch.join(
    settings,
    join_timeout_s=_JOIN_TIMEOUT_S.value,
    lost_after_s=_LOST_AFTER_S.value,
  )
  app.join_job(watch)
  logging.info(
    "process %d of %d, at %s%s: %d devices of its own, of %d",
    settings.process_id,
    settings.num_processes,
    settings.coordinator,
    f" ({settings.cluster})" if settings.cluster else "",
    jax.local_device_count(),
    jax.device_count(),
  )
  app.leave_the_log_to_the_first()
  given = {f"--{flag.name}": flag.value for flag in others}
  processes.check_equal(given | {"config": records.plain(experiment)})
