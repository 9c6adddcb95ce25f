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
from aquila_jax.training.spikes import Event, no_steps
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
    program, train_step = build_step(job)
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
      # The order of an iteration is: log, evaluate, save, next batch, step. A
      # checkpoint of step s so holds what step s logged and its validation, and
      # the position in the data from which step s + 1 reads.
      while True:
        wishes = agreement.reached(
          Wishes(stop=signals.received, save=_time_to_save(job, run)),
          at_the_end=run.step == job.total_steps,
        )
        is_logged = not run.recorder.is_empty and _row_is_due(job, run)
        if (
          is_logged
          or _validation_is_due(job, run, wishes=wishes)
          or _save_is_due(job, run, saved, validation=None, wishes=wishes)
        ) and _goes_back(job, run, program, saved=saved, writer=writer):
          batches = job.input.batches(run.data_state)
          continue
        if is_logged:
          epochs = job.input.epochs(run.data_state)
          row = run.recorder.row(run.step, epochs=epochs)
          writer.train(row)
          reporter.show(row)

        validation = None
        if _validation_is_due(job, run, wishes=wishes):
          validation = _validate(job, run, saved=saved)
          writer.validation(validation)
          reporter.show_validation(run.step, loss=validation["loss"])

        with goodput.spent("saving"):
          saved.check()
        if _save_is_due(job, run, saved, validation=validation, wishes=wishes):
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
          run.data_states[run.step] = data_state
        profiler.after(run.step, result=run.state)

        reporter.advance(run.step)
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
  # After each step whose metrics are not on the host yet.
  data_states: dict[int, DataState] = dataclasses.field(default_factory=dict)
  last_skipped: int = -1  # the last step that was
  skipped_in_a_row: int = 0
  went_back_to: int = -1  # the checkpoint that the run went back to last
  times_back: int = 0  # to that one


def build_step(job: TrainJob) -> tuple[Program, Any]:
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
    state = initial_state(job, program)
    progress = {
      "data_state": job.data_state.to_json(),
      "wall_s": 0.0,
      "window": {},
      "validated_step": -1,
    }
  return _Run(
    step=step,
    state=state,
    data_state=DataState.from_json(progress["data_state"]),
    recorder=_recorder(job, step, progress, wall_s=progress["wall_s"]),
    goodput=goodput,
    validated_step=progress["validated_step"],
    saved_at=time.monotonic(),
    watch=_routing_watch(job, state, step),
  )


def initial_state(job: TrainJob, program: Program) -> TrainState:
  """The state at step 0; the job's model is handed over."""
  return state_lib.place_initial(
    job.initial(),
    optimizer=program.optimizer,
    like=program.state,
    balance_weights=initial_weights(job.train.loss, job.model),
    recent=no_steps(job.train.spikes),
  )


def _recorder(
  job: TrainJob, step: int, progress: Mapping[str, Any], *, wall_s: float
) -> Recorder:
  return Recorder(
    languages=job.input.languages,
    tokens_per_step=job.train.tokens_per_step,
    flops_per_token=job.flops_per_token,
    peak_flops=peak_flops(job.mesh.devices.flatten().tolist()),
    moe_layers=job.model.moe_layers,
    step=step,
    wall_s=wall_s,
    window=Window(**progress["window"]),
  )


def _routing_watch(
  job: TrainJob, state: TrainState, step: int
) -> RoutingWatch | None:
  """A run that is done already saves no more, and needs none."""
  if job.route is None or step == job.total_steps:
    return None
  return RoutingWatch.start(
    job.route, state.params, layers=job.model.moe_layers, step=step
  )


def _watch(run: _Run, *, writer: MetricsWriter) -> None:
  """Says how far routing has moved since the last checkpoint."""
  if run.watch is None:
    return
  started = time.perf_counter()
  with run.goodput.spent("validation"):
    writer.routing(run.watch.row(run.step, run.state.params))
  run.recorder.clock.exclude(time.perf_counter() - started)


def _row_is_due(job: TrainJob, run: _Run) -> bool:
  return run.step % job.train.log_every == 0 or run.step == job.total_steps


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
    # For what may go wrong before the first other one.
    return job.train.spikes.can_rewind
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


def _goes_back(
  job: TrainJob,
  run: _Run,
  program: Program,
  *,
  saved: Checkpoints,
  writer: MetricsWriter,
) -> bool:
  """Fetches the metrics of all steps so far, and does what they ask for.

  Returns:
    Whether the run stands at an earlier checkpoint now.

  Raises:
    errors.TrainingStopped: where the config says so, or it would go on forever.
  """
  with run.goodput.spent("steps"):  # it waits for them
    events = run.recorder.fetch()
  policy = job.train.spikes
  for event in events:
    if event.stops(policy):
      break
    if event.wants_rewind(policy):
      _go_back(job, run, program, event=event, saved=saved, writer=writer)
      return True
    _note_skipped(job, run, event, saved=saved, writer=writer)
  bad_steps = tuple(event.step for event in events if event.stops(policy))
  if bad_steps:
    raise errors.TrainingStopped(
      f"{job.stage}: loss, gradients or parameters are not finite at"
      f" {_named(bad_steps)}; {saved.last_good}"
    )
  run.data_states.clear()
  return False


def _warn_once(message: str, *args: object) -> None:
  """Of what all processes see alike, the first speaks."""
  if processes.is_first():
    logging.warning(message, *args)


def _note_skipped(
  job: TrainJob,
  run: _Run,
  event: Event,
  *,
  saved: Checkpoints,
  writer: MetricsWriter,
) -> None:
  """Says that a step was skipped; too many in a row end the run."""
  _warn_once("%s: %s; skipped", job.stage, event.in_words())
  writer.spike({**dataclasses.asdict(event), "then": "skipped"})
  follows = event.step == run.last_skipped + 1
  run.skipped_in_a_row = run.skipped_in_a_row + 1 if follows else 1
  run.last_skipped = event.step
  if run.skipped_in_a_row >= job.train.spikes.most_in_a_row:
    raise errors.TrainingStopped(
      f"{job.stage}: {run.skipped_in_a_row} steps in a row were skipped, the"
      f" last of them {event.step}; {saved.last_good}"
    )


def _go_back(
  job: TrainJob,
  run: _Run,
  program: Program,
  *,
  event: Event,
  saved: Checkpoints,
  writer: MetricsWriter,
) -> None:
  """To the checkpoint before a step, and past the step's batch."""
  policy, after = job.train.spikes, run.data_states[event.step]
  step = saved.newest_until(event.step - policy.rewind_margin)
  if step is None:
    raise errors.TrainingStopped(
      f"{job.stage}: {event.in_words()}; there is no checkpoint of"
      f" {policy.rewind_margin} steps before it to go back to"
    )
  run.times_back = run.times_back + 1 if step == run.went_back_to else 1
  run.went_back_to = step
  if run.times_back > policy.most_in_a_row:
    raise errors.TrainingStopped(
      f"{job.stage}: {event.in_words()}; the run has gone back to step {step}"
      f" {policy.most_in_a_row} times; {saved.last_good}"
    )
  _warn_once(
    "%s: %s; going back to step %d, and on after the batch of step %d",
    *(job.stage, event.in_words(), step, event.step),
  )
  writer.spike({**dataclasses.asdict(event), "then": f"back to step {step}"})
  saved.forget_after(step)
  with run.goodput.spent("restore"):
    run.state, progress = saved.restore(
      program.state,
      config=job.saved_config,
      path=job.config_path,
      step=step,
    )
  writer.rewind(step)
  run.recorder = _recorder(
    job, step, progress, wall_s=run.recorder.clock.seconds
  )
  run.step, run.data_state = step, after
  run.data_states.clear()
  run.validated_step = progress["validated_step"]
  run.watch = _routing_watch(job, run.state, step)


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
