"""Training of one stage: the visible loop.

Where the weights come from is one ordered decision (`_start`): this run's
newest checkpoint, or else what the job's `initial` gives.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from aquila_jax.core import errors, processes
from aquila_jax.core.experiment_config import TrainConfig
from aquila_jax.core.lineage import Copies
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Params, TrainState
from aquila_jax.data.loader import DataState
from aquila_jax.models.causality import warn_unless_causal
from aquila_jax.training import inputs
from aquila_jax.training import state as state_lib
from aquila_jax.training.agreement import Route, RoutingWatch
from aquila_jax.training.balance import initial_weights
from aquila_jax.training.checkpointing import Checkpoints, saved_config
from aquila_jax.training.compilation import compile_step
from aquila_jax.training.freezing import NewIndices
from aquila_jax.training.goodput import Goodput
from aquila_jax.training.goodput import in_words as goodput_in_words
from aquila_jax.training.interruption import Interrupted, StopSignals
from aquila_jax.training.metrics import (
  MetricsWriter,
  Row,
  metrics_writer,
  read_rows,
)
from aquila_jax.training.profiling import Profiler
from aquila_jax.training.program import Program, make_program
from aquila_jax.training.progress import Reporter
from aquila_jax.training.recorder import Recorder, Window
from aquila_jax.training.state import InitialModel
from aquila_jax.training.throughput import peak_flops
from aquila_jax.training.watchdog import Watchdog
from aquila_jax.training.wishes import Agreement, Wishes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainJob:
  """All that the training of one stage needs."""

  stage: str
  model: ModelConfig  # of a growth mask, with its value at step 0
  train: TrainConfig
  # Optimizer steps: train.steps, or what train.match_flops comes to.
  total_steps: int
  mesh: Mesh
  workdir: epath.Path
  input: inputs.TrainInput
  # Where the data starts, and the weights; unused when the run is resumed.
  data_state: DataState
  initial: Callable[[], InitialModel]
  # Forward and backward, and a first pass for the load where there is one.
  flops_per_token: float
  seed: int = 0  # of the routers' noise
  # What the last growth of the model added, for freeze.new_only.
  new_indices: NewIndices | None = None
  # The model's past, of its lineage: the copies of its growth, for growth_lr,
  # and the steps that it was trained, for continuation.
  copies: Copies | None = None
  trained_steps: int | None = None
  # What else must be the same when the run is resumed: seeds, digest of the
  # data. Plain JSON.
  identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # (parameters, step) -> numbers, with "loss" among them.
  evaluate: Callable[[Params, int], Mapping[str, float]] | None = None
  # Where the tokens of a standing text go, of a mixture; None looks at none.
  route: Route | None = None
  profile_steps: tuple[int, int] | None = None
  config_path: str = "config"  # dotted name of the stage's config

  @property
  def saved_config(self) -> dict[str, Any]:
    others = {"total_steps": self.total_steps, **self.identity}
    return saved_config(model=self.model, train=self.train, others=others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
  """What a finished stage leaves."""

  state: TrainState
  data_state: DataState
  steps: int
  tokens: int
  flops: float
  wall_s: float  # training, without compilation and validation
  spent_s: dict[str, float]  # the whole wall time, of `Goodput`
  last_row: Row | None  # of metrics.jsonl
  validation_losses: dict[int, float]  # of the checkpoints that stand


def train(job: TrainJob) -> TrainResult:
  """Trains a stage to its last step, from wherever its workdir stands.

  Args:
    job: see its fields. Under `workdir` it writes checkpoints/, metrics.jsonl,
      validation.jsonl, tensorboard/ and, if asked, profile/.

  Returns:
    The final state. It is bit for bit the same however often the run was
    stopped and started again.

  Raises:
    errors.UserError: on a config that does not fit the model, the devices or
      the checkpoint that is there.
    errors.TrainingStopped: on a loss, gradient or parameter that is not finite.
    errors.DiskFull: where a checkpoint could not be saved.
    Interrupted: after SIGTERM or SIGINT, when the step is saved.
  """
  goodput = Goodput()
  with goodput.spent("compile"):
    program, train_step = _build(job)
  workdir, config = job.workdir, job.train
  with (
    StopSignals() as signals,
    Profiler(
      workdir / "profile",
      steps=job.profile_steps,
      total_steps=job.total_steps,
    ) as profiler,
    _open_checkpoints(job, goodput) as saved,
    Watchdog(config.watchdog_s) as watchdog,
  ):
    run = _start(job, program, saved=saved, goodput=goodput)
    with (
      metrics_writer(workdir, last_step=run.step) as writer,
      Reporter(
        job.stage,
        total_steps=job.total_steps,
        step=run.step,
        is_silent=not processes.is_first(),
      ) as reporter,
    ):
      agreement = Agreement(job.mesh)
      batches = job.input.batches(run.data_state)
      # The order of an iteration is: evaluate, save, next batch, step, log.
      # A checkpoint of step s so holds what step s logged and its validation,
      # and the position in the data from which step s + 1 reads.
      while True:
        wishes = agreement.reached(
          Wishes(stop=signals.received, save=_time_to_save(job, run)),
          at_the_end=run.step == job.total_steps,
        )
        validation = None
        if _validation_is_due(job, run, wishes=wishes):
          validation = _validate(job, run, saved=saved)
          writer.validation(validation)
          reporter.show_validation(run.step, loss=validation["loss"])

        with goodput.spent("saving"):
          saved.check()
        if _save_is_due(job, run, saved, validation=validation, wishes=wishes):
          _stop_unless_finite(job, run, saved=saved)
          # First, so that a checkpoint never is without its row.
          _watch(run, writer=writer)
          _save(job, run, saved=saved, validation=validation)
        if wishes.stop is not None:
          raise Interrupted(run.step, signal_number=wishes.stop)
        if run.step == job.total_steps:
          break

        watchdog.rearm()
        started = time.perf_counter()
        with goodput.spent("data_wait"):
          batch, data_state = next(batches)
        run.recorder.waited(time.perf_counter() - started)
        batch = inputs.place(batch, like=program.batch)

        profiler.before(run.step)
        # Nothing may cross between host and devices within a step.
        with goodput.spent("steps"):
          with jax.transfer_guard("disallow"):
            run.state, metrics = train_step(run.state, batch)
          run.step, run.data_state = run.step + 1, data_state
          run.recorder.add(run.step, metrics)
        profiler.after(run.step, result=run.state)

        reporter.advance(run.step)
        if run.step % config.log_every == 0 or run.step == job.total_steps:
          _stop_unless_finite(job, run, saved=saved)
          epochs = job.input.epochs(run.data_state)
          row = run.recorder.row(run.step, epochs=epochs)
          writer.train(row)
          reporter.show(row)
    with goodput.spent("saving"):
      saved.wait()
    return _result(job, run, saved=saved)


@dataclasses.dataclass(kw_only=True)
class _Run:
  """Where the loop stands."""

  step: int  # the same number as state.step, on the host
  state: TrainState
  data_state: DataState
  recorder: Recorder
  goodput: Goodput
  validated_step: int  # the last one
  saved_at: float  # time.monotonic() of the last save
  watch: RoutingWatch | None


def _build(job: TrainJob) -> tuple[Program, Any]:
  """The step's program, and it compiled: (state, batch) -> (state, metrics)."""
  warn_unless_causal(job.model, what=f"training of {job.stage}")
  program = make_program(
    job.model,
    job.train,
    mesh=job.mesh,
    total_steps=job.total_steps,
    num_languages=len(job.input.languages),
    seed=job.seed,
    new_indices=job.new_indices,
    copies=job.copies,
    trained_steps=job.trained_steps,
    path=f"{job.config_path}.train",
  )
  step = compile_step(program.jitted, program.state, program.batch)
  return program, step


def _open_checkpoints(job: TrainJob, goodput: Goodput) -> Checkpoints:
  with goodput.spent("restore"):
    return Checkpoints(job.workdir / "checkpoints", config=job.train.checkpoint)


def _start(
  job: TrainJob, program: Program, *, saved: Checkpoints, goodput: Goodput
) -> _Run:
  """Where the weights come from: this run's checkpoint, or the job."""
  step = saved.latest_step
  if step is not None:
    with goodput.spent("restore"):
      state, progress = saved.restore(
        program.state, config=job.saved_config, path=job.config_path
      )
    # Checkpoints of before there was one are without.
    goodput.add(progress.get("spent_s", {}))
    logging.info("%s: going on from step %d", job.stage, step)
  else:
    step = 0
    state = state_lib.place_initial(
      job.initial(),
      optimizer=program.optimizer,
      like=program.state,
      balance_weights=initial_weights(job.train.loss, job.model),
    )
    progress = {
      "data_state": job.data_state.to_json(),
      "wall_s": 0.0,
      "window": {},
      "validated_step": -1,
    }
  recorder = Recorder(
    languages=job.input.languages,
    tokens_per_step=job.train.tokens_per_step,
    flops_per_token=job.flops_per_token,
    peak_flops=peak_flops(job.mesh.devices.flatten().tolist()),
    moe_layers=job.model.moe_layers,
    step=step,
    wall_s=progress["wall_s"],
    window=Window(**progress["window"]),
  )
  return _Run(
    step=step,
    state=state,
    data_state=DataState.from_json(progress["data_state"]),
    recorder=recorder,
    goodput=goodput,
    validated_step=progress["validated_step"],
    saved_at=time.monotonic(),
    # A run that is done already saves no more.
    watch=None
    if job.route is None or step == job.total_steps
    else RoutingWatch.start(
      job.route, state.params, layers=job.model.moe_layers, step=step
    ),
  )


def _watch(run: _Run, *, writer: MetricsWriter) -> None:
  """Says how far routing has moved since the last checkpoint."""
  if run.watch is None:
    return
  started = time.perf_counter()
  with run.goodput.spent("validation"):
    writer.routing(run.watch.row(run.step, run.state.params))
  run.recorder.clock.exclude(time.perf_counter() - started)


def _validation_is_due(job: TrainJob, run: _Run, *, wishes: Wishes) -> bool:
  every = job.train.evaluate_every
  return (
    job.evaluate is not None
    and wishes.stop is None  # the next start makes up for it
    and every > 0
    and run.step > 0
    and (run.step % every == 0 or run.step == job.total_steps)
    and run.step != run.validated_step
  )


def _validate(job: TrainJob, run: _Run, *, saved: Checkpoints) -> Row:
  _stop_unless_finite(job, run, saved=saved)  # waits for the queued steps
  assert job.evaluate is not None
  started = time.perf_counter()
  with run.goodput.spent("validation"):
    numbers = dict(job.evaluate(run.state.params, run.step))
  run.recorder.clock.exclude(time.perf_counter() - started)
  run.validated_step = run.step
  if not math.isfinite(numbers["loss"]):
    raise errors.TrainingStopped(
      f"{job.stage}: the validation loss is not finite at step {run.step};"
      f" {saved.last_good}"
    )
  return {"step": run.step, **numbers}


def _save_is_due(
  job: TrainJob,
  run: _Run,
  saved: Checkpoints,
  *,
  validation: Row | None,
  wishes: Wishes,
) -> bool:
  if run.step == saved.latest_step:
    return False
  if wishes.stop is not None or run.step == job.total_steps:
    return True
  if run.step == 0:
    return False
  rules = job.train.checkpoint
  if run.step % rules.every_steps == 0:
    return True
  if validation is not None and rules.keep_best:
    # One of the best so far: only what is saved can be kept.
    better = [x for x in saved.losses.values() if x <= validation["loss"]]
    if len(better) < rules.keep_best:
      return True
  return wishes.save


def _time_to_save(job: TrainJob, run: _Run) -> bool:
  """By the clock of the first process."""
  elapsed = time.monotonic() - run.saved_at
  every_seconds = job.train.checkpoint.every_seconds
  return processes.is_first() and 0 < every_seconds <= elapsed


def _save(
  job: TrainJob, run: _Run, *, saved: Checkpoints, validation: Row | None
) -> None:
  run.saved_at = time.monotonic()
  progress = {
    "data_state": run.data_state.to_json(),
    "wall_s": run.recorder.clock.seconds,
    "spent_s": run.goodput.seconds,
    "window": dataclasses.asdict(run.recorder.window),
    "validated_step": run.validated_step,
  }
  with run.goodput.spent("saving"):
    saved.save(
      run.step,
      state=run.state,
      progress=progress,
      config=job.saved_config,
      validation=None if validation is None else {"loss": validation["loss"]},
    )


def _stop_unless_finite(
  job: TrainJob, run: _Run, *, saved: Checkpoints
) -> None:
  """Fetches the metrics of all steps so far."""
  with run.goodput.spent("steps"):  # it waits for them
    bad_steps = run.recorder.fetch()
  if bad_steps:
    raise errors.TrainingStopped(
      f"{job.stage}: loss, gradients or parameters are not finite at"
      f" {_named(bad_steps)}; {saved.last_good}"
    )


def _named(steps: tuple[int, ...]) -> str:
  shown = ", ".join(map(str, steps[:8]))
  more = f" and {len(steps) - 8} more" if len(steps) > 8 else ""
  return f"step{'s' * (len(steps) > 1)} {shown}{more}"


def _result(job: TrainJob, run: _Run, *, saved: Checkpoints) -> TrainResult:
  rows = processes.from_first(
    lambda: read_rows(job.workdir / "metrics.jsonl")[-1:], name="last row"
  )
  tokens = run.step * job.train.tokens_per_step
  spent_s = run.goodput.seconds
  logging.info("%s: %s", job.stage, goodput_in_words(spent_s))
  return TrainResult(
    state=run.state,
    data_state=run.data_state,
    steps=run.step,
    tokens=tokens,
    flops=tokens * job.flops_per_token,
    wall_s=run.recorder.clock.seconds,
    spent_s=spent_s,
    last_row=rows[-1] if rows else None,
    validation_losses=saved.losses,
  )
