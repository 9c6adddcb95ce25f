"""The flags of a job of several processes, and how a verb becomes one of it."""

from __future__ import annotations

import jax
from absl import flags, logging

from aquila_jax.cli import app
from aquila_jax.core import process_watch
from aquila_jax.core.process_settings import find_settings

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
  "join_timeout_s", 300.0, "How long the processes wait for each other."
)
_LOST_AFTER_S = flags.DEFINE_float(
  "lost_after_s",
  100.0,
  "The silence of a process after which the others end.",
)


def join() -> None:
  """Makes this process one of several, where flags or environment say so.

  To be called before any device is touched, by a verb that all of them run.

  Raises:
    errors.UserError: as `find_settings` and `process_watch.join`.
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
