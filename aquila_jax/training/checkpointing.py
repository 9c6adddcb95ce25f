"""Checkpoints of a stage: state, position in the data and config together.

  checkpoints/
    STEP/
      state/     step, params, moments, ema, balance_weights: Orbax, one zarr3
                 directory a leaf
      progress/  position in the data, training seconds, sums of the open row
      config/    the resolved config of the stage
      metrics/   the validation loss, where there was a validation
      MANIFEST.json  size and checksum of every file
  damaged_checkpoints/
    STEP/        a step that was not as it was saved

A step is written beside its place by a background thread and renamed into it,
and what is no longer kept is renamed before it is removed: a killed run leaves
whole steps, and what the next start removes. It verifies every step by its
manifest.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint import handlers

from aquila_jax.core import config as config_lib
from aquila_jax.core import disk, errors, files, processes
from aquila_jax.core.experiment_config import CheckpointConfig
from aquila_jax.core.moments import AdamMoments, get_moments, set_moments
from aquila_jax.core.types import TrainState
from aquila_jax.training import manifest
from aquila_jax.training.interruption import Interrupted

_TEMPORARY = ".orbax-checkpoint-tmp"
# Steps that are no longer kept are renamed into it before they are removed, so
# that a kill in between leaves no half of one.
_REMOVED = "removed"
# Of a TrainConfig: what may change between two starts of a run, since it does
# not change a single bit of the parameters.
_HARMLESS = (
  "log_every",
  "checkpoint",
  "evaluate_every",
  "evaluate_tokens",
  "overlap_collectives",
  "watchdog_s",
)
# Sections that came later as a whole.
_LATER_SECTIONS = ("spikes",)
# And the fields that came later, as what was saved without them had them.
_BEFORE: dict[str, Any] = {
  "train": {
    "mask_steps": 0,
    "spikes": {
      "nonfinite": "stop",
      "spike": "ignore",
      "sigmas": 6.0,
      "window": 128,
      "rewind_margin": 1,
      "most_in_a_row": 10,
    },
    "loss": {
      "balance_over": "micro_batch",
      "adaptive_balance": None,
      "bias_rate": 0.001,
    },
  },
  "model": {
    "head_chunks": 1,
    "moe": {
      "gate_scale": 1.0,
      "choice": "token",
      "selection_bias": False,
      "logit_normalisation": None,
      "num_groups": 1,
      "top_groups": 1,
      "group_score": "max",
      "input_jitter": 0.0,
      "logit_noise": 0.0,
      "exchange": None,
      "buffer_factor": 1.5,
    },
  },
}

JsonDict = dict[str, Any]

# What a second Ctrl-C left while it was saving, by directory: in a notebook the
# process lives on, and the cell is run again.
_left: dict[str, Checkpoints] = {}


class Checkpoints:
  """The checkpoints of one stage, newest and best. A context manager.

  Args:
    directory: made if missing; what a killed run left half-written is removed,
      and steps that are damaged are moved beside it.
    config: how many to keep.

  Raises:
    errors.UserError: where there are steps and none of them is whole.
  """

  def __init__(self, directory: epath.Path, *, config: CheckpointConfig):
    self.directory = directory
    self._step: int | None = None  # is being saved, or was last
    self._is_checked = True  # the save of that step
    self._remover: threading.Thread | None = None
    self._barrier = _SaveBarrier()
    left = _left.pop(os.fspath(directory), None)
    if left is not None:
      left._finish_late()
    if processes.is_first():
      directory.mkdir(parents=True, exist_ok=True)
      _remove_unfinished(directory)
      _move_damaged(directory)
    processes.barrier("checkpoints verified")
    self._manager = ocp.CheckpointManager(
      os.fspath(directory),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_preservation(config),
        best_fn=_validation_loss,
        best_mode="min",
        todelete_subdir=_REMOVED,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_manifest,
          barrier_sync_fn=self._barrier if processes.are_several() else None,
        ),
      ),
      handler_registry=_registry(),
    )
    # Beside the manager's own, which it can read only when a save is done.
    stored = {s: self._manager.metrics(s) for s in self._manager.all_steps()}
    self._losses = {s: _validation_loss(m) for s, m in stored.items() if m}

  @property
  def latest_step(self) -> int | None:
    """The newest step that was saved or is being saved."""
    return self._manager.latest_step()

  @property
  def losses(self) -> dict[int, float]:
    """The validation loss of every step that is kept and has one."""
    kept = self._manager.all_steps()
    return {s: loss for s, loss in self._losses.items() if s in kept}

  def save(
    self,
    step: int,
    *,
    state: TrainState,
    progress: JsonDict,
    config: JsonDict,
    validation: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save; the state may be donated as soon as this returns.

    Args:
      step: of the stage; it must not have been saved.
      state: finite.
      progress: all else that training needs to go on; plain JSON.
      config: of `saved_config`.
      validation: with the key `loss`, if the step was validated.
    """
    self.wait()
    self._join_remover()
    self._step, self._is_checked = step, False
    self._barrier.begin()
    with self._named_if_full():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(_to_tree(state)),
          progress=ocp.args.JsonSave(progress),
          config=ocp.args.JsonSave(config),
        ),
        metrics=None if validation is None else dict(validation),
        force=True,
        custom_metadata=manifest.MARK,
      )
    if validation is not None:
      self._losses[step] = validation["loss"]

  def restore(
    self,
    state: TrainState,
    *,
    config: JsonDict,
    path: str = "config",
    step: int | None = None,
  ) -> tuple[TrainState, JsonDict]:
    """Reads a checkpoint.

    Args:
      state: of `abstract_state`; where every leaf goes.
      config: of `saved_config`, of the present run.
      path: the dotted name of the stage's config, for messages.
      step: of `newest_until`; None is the newest.

    Returns:
      The state and what was saved as `progress`.

    Raises:
      errors.UserError: where the present config differs from the saved one in
        a field that changes the training; it lists all of them.
    """
    step = self.latest_step if step is None else step
    assert step is not None, "there is no checkpoint"
    small = self._manager.restore(
      step,
      args=ocp.args.Composite(
        config=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore()
      ),
    )
    check_same(
      small["config"], config, what=self.directory / str(step), path=path
    )
    like = _to_tree(state)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          item=like,
          restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        )
      ),
    )
    return _from_tree(restored["state"], like=state), small["progress"]

  def newest_until(self, step: int) -> int | None:
    """The newest step that is saved, up to one; None where none is."""
    steps = [saved for saved in self._manager.all_steps() if saved <= step]
    return max(steps, default=None)

  def forget_after(self, step: int) -> None:
    """Removes later steps, so that a new start goes on from this one.

    Raises:
      errors.DiskFull: where a save in the background had no room.
    """
    self.wait()
    self._join_remover()
    # The latest first: stopped in between, the rest is a run that goes on.
    for later in sorted(self._manager.all_steps(), reverse=True):
      if later > step:
        self._manager.delete(later)
        self._losses.pop(later, None)

  def check(self) -> None:
    """Raises what has become of a save in the background, if it has failed.

    Raises:
      errors.DiskFull: where there was no room for it.
    """
    is_over = self._barrier.has_failed or (
      not self._manager.is_saving_in_progress()
    )
    if not self._is_checked and is_over:
      self.wait()

  def wait(self) -> None:
    """Returns when everything saved is on disk.

    Raises:
      errors.DiskFull: where there was no room for it.
    """
    with self._named_if_full():
      self._manager.wait_until_finished()
    self._is_checked = True
    removed = self.directory / _REMOVED
    if self._remover is None and processes.is_first() and removed.exists():
      self._remover = threading.Thread(target=removed.rmtree, name="remover")
      self._remover.start()

  def _join_remover(self) -> None:
    if self._remover is not None:
      self._remover.join()
      self._remover = None

  def _write_manifest(self) -> None:
    """Called in the background, when the files of a step are written."""
    # Where a directory cannot be renamed, a step is written in its place.
    written = self.directory / str(self._step)
    for child in self.directory.iterdir():
      if child.name.startswith(f"{self._step}{_TEMPORARY}"):
        written = child
    manifest.write(written)

  @contextlib.contextmanager
  def _named_if_full(self) -> Iterator[None]:
    """Turns what a full disk makes of saving into one error."""
    try:
      yield
    except Exception as error:
      reason = disk.why_full(error)
      if reason is None:
        raise
      if not processes.are_several():
        files.remove_failed(
          self.directory, lambda: _remove_unfinished(self.directory)
        )
        self._manager.reload()  # it has forgotten what this step was to replace
      raise errors.DiskFull(
        f"{self.directory}: step {self._step} could not be saved: {reason};"
        f" {self.last_good}; free some space, and the same command goes on"
      ) from error

  @property
  def last_good(self) -> str:
    """Which checkpoint stands, in words."""
    if self.latest_step is None:
      return "nothing was saved before"
    return (
      f"the last good checkpoint is of step {self.latest_step}, in"
      f" {self.directory}"
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # A second Ctrl-C stops at once; the next start removes what is half done.
    # So does an error of which other processes do not know: they may be at
    # another place, and cannot be waited for.
    at_once = kind is not None and issubclass(kind, KeyboardInterrupt)
    is_known = kind is None or issubclass(
      kind, errors.TrainingStopped | Interrupted
    )
    if not at_once and (is_known or not processes.are_several()):
      self._close()
    elif not processes.are_several():  # whom a save waits for at its end
      _left[os.fspath(self.directory)] = self

  def _close(self) -> None:
    self.wait()
    self._join_remover()
    self._manager.close()

  def _finish_late(self) -> None:
    """Ends what writes to the directory still."""
    try:
      self._close()
    except Exception as error:
      logging.warning("%s: a save has failed late: %s", self.directory, error)


class _SaveBarrier:
  """Orbax's barrier for the background threads of several processes.

  At the end of a save it waits for the others where the save has failed too,
  and they wait where it has not come to. One that has failed raises here.
  """

  def __init__(self):
    self.has_failed = False
    self._is_committed = False

  def begin(self) -> None:
    """A save begins."""
    self._is_committed = False

  def __call__(self, *, key: str, timeout_ms: int) -> None:
    in_background = threading.current_thread() is not threading.main_thread()
    if "set_value" in key and in_background and not self._is_committed:
      self.has_failed = True
      raise RuntimeError("the save has failed, and waits for no other process")
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
    if "async_commit_complete" in key:
      self._is_committed = True


def saved_config(
  *, model: Any, train: Any, others: Mapping[str, Any]
) -> JsonDict:
  """What a checkpoint keeps of the config and compares on resumption.

  Args:
    model: the ModelConfig.
    train: the TrainConfig.
    others: whatever else must not change: seed, digest of the data, steps.

  Returns:
    Plain JSON.
  """
  return config_lib.to_dict({"model": model, "train": train, **others})


def check_same(
  saved: JsonDict, present: JsonDict, *, what: epath.Path, path: str
) -> None:
  """Refuses to go on with a config that changes the training.

  Args:
    saved: of `saved_config`, as it was.
    present: of `saved_config`, as it is now.
    what: where `saved` stands, for messages.
    path: the dotted name of the stage's config, for messages.

  Raises:
    errors.UserError: where they differ, but for what is harmless; it lists all
      fields.
  """
  changed = config_lib.differences(_compared(saved), _compared(present), path)
  if changed:
    raise errors.UserError(
      f"{what} was made with another config; use another workdir, or change"
      f" back: {'; '.join(changed)}"
    )


def _remove_unfinished(directory: epath.Path) -> None:
  for child in directory.iterdir():
    if (
      _TEMPORARY in child.name
      or child.name == _REMOVED
      or child.name.isdigit()
      and not ocp.utils.is_checkpoint_finalized(child)
    ):
      logging.info("removing %s, which is not whole", child)
      child.rmtree()


def _move_damaged(directory: epath.Path) -> None:
  """Verifies all steps, and moves those that are damaged out of the way.

  Raises:
    errors.UserError: where no step is whole; they are left as they are.
  """
  steps = [child for child in directory.iterdir() if child.name.isdigit()]
  steps.sort(key=lambda step: int(step.name), reverse=True)
  faults = {}
  for step in steps:
    if manifest.is_of_before(step):
      logging.warning("%s has no checksums (an older version); trusted", step)
      continue
    fault = manifest.fault(step)
    if fault is not None:
      faults[step] = fault
  if steps and len(faults) == len(steps):
    listed = "; ".join(f"{step.name}/{why}" for step, why in faults.items())
    raise errors.UserError(
      f"{directory}: no checkpoint is whole: {listed}; put one back from a"
      " copy, or remove the directory to begin the stage anew"
    )
  for step, fault in faults.items():
    aside = _free_name(directory.parent / "damaged_checkpoints" / step.name)
    aside.parent.mkdir(exist_ok=True)
    step.rename(aside)
    logging.warning(
      "%s/%s; the checkpoint is passed over, and moved to %s",
      *(step, fault, aside),
    )


def _free_name(path: epath.Path) -> epath.Path:
  number, free = 1, path
  while free.exists():
    number += 1
    free = path.parent / f"{path.name}.{number}"
  return free


def _preservation(config: CheckpointConfig) -> policies.AnyPreservationPolicy:
  keep: list[Any] = [policies.LatestN(n=config.keep_last)]
  if config.keep_best:
    best = policies.BestN(
      get_metric_fn=_validation_loss,
      n=config.keep_best,
      reverse=True,  # the last of the sorted are kept: the lowest losses
      keep_checkpoints_without_metrics=False,
    )
    keep.append(best)
  return policies.AnyPreservationPolicy(keep)


def _validation_loss(metrics: Any) -> float:
  return metrics["loss"]


def _registry() -> handlers.DefaultCheckpointHandlerRegistry:
  registry = handlers.DefaultCheckpointHandlerRegistry()
  leaves = ocp.type_handlers.ArrayHandler(
    # Orbax cuts a leaf that lies on all devices into as many pieces, each
    # written from its own. In one process that divides no work, and each cut is
    # a program to compile: a second of a first save.
    use_replica_parallel=processes.are_several(),
  )
  arrays = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,
    use_zarr3=True,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, leaves)
    ),
  )
  registry.add("state", ocp.args.PyTreeSave, arrays)
  registry.add("state", ocp.args.PyTreeRestore, arrays)
  for name in ("progress", "config"):
    handler = ocp.JsonCheckpointHandler()
    registry.add(name, ocp.args.JsonSave, handler)
    registry.add(name, ocp.args.JsonRestore, handler)
  return registry


def _to_tree(state: TrainState) -> dict[str, Any]:
  """Plain nested dicts: independent of how the optimizer is composed."""
  moments = get_moments(state.opt_state)
  tree = {
    "step": state.step,
    "params": state.params,
    "moments": {"count": moments.count, "mu": moments.mu, "nu": moments.nu},
  }
  if state.ema is not None:
    tree["ema"] = state.ema
  if state.balance_weights is not None:
    tree["balance_weights"] = state.balance_weights
  if state.recent is not None:
    tree["recent"] = state.recent
  assert len(jax.tree.leaves(tree)) == len(jax.tree.leaves(state))
  return tree


def _from_tree(tree: Mapping[str, Any], *, like: TrainState) -> TrainState:
  return TrainState(
    step=tree["step"],
    params=tree["params"],
    opt_state=set_moments(like.opt_state, AdamMoments(**tree["moments"])),
    ema=tree.get("ema"),
    balance_weights=tree.get("balance_weights"),
    recent=tree.get("recent"),
  )


def _compared(saved: JsonDict) -> JsonDict:
  config = _filled(saved, _BEFORE)
  train = {k: v for k, v in config["train"].items() if k not in _HARMLESS}
  loss = train.get("loss", {})
  is_whole = train.get("num_microbatches") == 1
  if is_whole and loss.get("balance_over") == "micro_batch":
    # One microbatch is the whole batch.
    train["loss"] = loss | {"balance_over": "global"}
  return config | {"train": train}


def _filled(tree: JsonDict, defaults: JsonDict) -> JsonDict:
  """`tree` with the defaults that it lacks, in the sections that it had."""
  found = dict(tree)
  for key, value in defaults.items():
    if not isinstance(value, dict) or key in _LATER_SECTIONS:
      found.setdefault(key, value)
    elif isinstance(found.get(key), dict):
      found[key] = _filled(found[key], value)
  return found
