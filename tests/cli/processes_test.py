"""Training by two and by four processes of this machine, and their ends."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from etils import epath

from aquila_jax.core import array_store
from aquila_jax.core import config as config_lib
from aquila_jax.core.experiment_config import MeshConfig, TrainConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.data.prepared import PreparedData
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training.checkpointing import Checkpoints
from aquila_jax.training.metrics import read_rows
from aquila_jax.training.program import make_program
from tests import brief
from tests.cli.commands import SMOKE, Commands, Ended, ended, names, succeeded

STEPS, BATCH_SIZE, SEQUENCE_LENGTH = 24, 8, 32
LOST_AFTER_S = 8
# Pairs of processes have the same rows, and other parts of the parameters.
MESH = (
  "--config.mesh.data=1",
  "--config.mesh.fsdp=2",
  "--config.mesh.tensor=2",
)
# May change between two starts, and costs a program.
UNVALIDATED = "--config.stages.dense.train.evaluate_every=0"
# Of a row: the clock's.
TIMES = {"wall_s", "tokens_per_s", "mfu", "data_wait_share"}
# Of a loss of float32 after up to STEPS updates whose sums were added in
# another order: each step rounds sums of BATCH_SIZE * SEQUENCE_LENGTH terms, by
# about the root of their number times 2^-24 (Higham, Accuracy and Stability of
# Numerical Algorithms, section 2.8), and the errors of the steps add up at
# worst. Another batch changes a loss by hundreds of that.
RTOL = STEPS * (BATCH_SIZE * SEQUENCE_LENGTH) ** 0.5 * 2**-24


def _command(
  data: pathlib.Path, workdir: pathlib.Path, *more: str
) -> tuple[str, ...]:
  train = "--config.stages.dense.train"
  return (
    "train",
    SMOKE,
    "--stage=dense",
    f"--config.data.prepared={data}",
    f"--workdir={workdir}",
    "--config.stages.dense.model.num_kv_heads=2",
    f"{train}.steps={STEPS}",
    f"{train}.batch_size={BATCH_SIZE}",
    f"{train}.sequence_length={SEQUENCE_LENGTH}",
    f"{train}.log_every=2",
    f"{train}.evaluate_every=12",
    f"{train}.evaluate_tokens=256",
    f"{train}.optimizer.warmup_steps=1",
    f"{train}.checkpoint.every_steps=4",
    f"{train}.checkpoint.keep_last=3",
    *more,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """Processes that were started together."""

  processes: list[subprocess.Popen[str]]
  coordinator: str

  def ended(self) -> list[Ended]:
    """Waits for all of them at once: none may wait for a full pipe."""
    with ThreadPoolExecutor(len(self.processes)) as pool:
      return list(pool.map(ended, self.processes))

  def await_file(self, path: pathlib.Path) -> None:
    while not path.exists():
      assert all(p.poll() is None for p in self.processes), self.ended()
      time.sleep(0.01)


def _with_devices(commands: Commands, number: int) -> Commands:
  return commands.with_environment(XLA_FLAGS=brief.with_devices(number))


def _start(
  commands: Commands,
  number: int,
  command: tuple[str, ...],
  *,
  last: tuple[str, ...] = (),
) -> Job:
  """`number` processes of one device each; flags that the last has besides."""
  coordinator = f"localhost:{_free_port()}"
  one = _with_devices(commands, 1)
  flags = (
    f"--coordinator={coordinator}",
    f"--num_processes={number}",
    f"--lost_after_s={LOST_AFTER_S}",
  )
  processes = [
    one.start(
      *command, *flags, f"--process_id={i}", *(last if i == number - 1 else ())
    )
    for i in range(number)
  ]
  return Job(processes=processes, coordinator=coordinator)


def _free_port() -> int:
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def _rows(path: pathlib.Path):
  rows = read_rows(epath.Path(path))
  return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def _losses(path: pathlib.Path) -> tuple[list[int], list[float]]:
  rows = _rows(path)
  return [row["step"] for row in rows], [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def whole(commands, data, tmp_path_factory) -> pathlib.Path:
  """A run that nothing happened to, of one process with two devices."""
  workdir = tmp_path_factory.mktemp("processes") / "whole"
  succeeded(_with_devices(commands, 2).run(*_command(data, workdir)))
  return workdir


def test_two_processes_are_one_with_two_devices_and_stop_and_go_on_as_it_does(
  commands, data, whole, tmp_path
):
  """To the bits: a sum of two is the same in either order."""
  run = tmp_path / "run"
  job = _start(commands, 2, _command(data, run))
  job.await_file(run / "checkpoints" / "4")
  job.processes[1].send_signal(signal.SIGTERM)
  first, second = job.ended()
  (step,) = re.findall(r"stopped by SIGTERM after step (\d+)", first.err)
  end = (
    f"stopped by SIGTERM after step {step}, which is saved; the same command"
    " goes on from there"
  )
  assert (first.code, second.code) == (143, 143)
  assert first.last_line == f"aquila_jax: {end}"
  assert second.last_line == f"aquila_jax: process 1: {end}"
  assert 4 <= int(step) < STEPS

  job = _start(commands, 2, _command(data, run))
  first, second = map(succeeded, job.ended())
  assert f"dense: going on from step {step}" in first.err.splitlines()
  assert first.out.splitlines()[-1] == f"MODEL: {run / 'model'}"
  who = f"of 2, at {job.coordinator}: 1 devices of its own, of 2"
  assert first.err.splitlines()[0] == f"process 0 {who}"
  assert second.err == f"process 1 {who}\n"
  # What Gloo says of itself it says on standard output.
  assert all(line.startswith("[Gloo]") for line in second.out.splitlines())
  assert names(run) == names(whole)
  # A file of events for each start: one process writes them.
  assert len(names(run / "tensorboard")) == 2
  for name in ("metrics.jsonl", "validation.jsonl"):
    assert _rows(run / name) == _rows(whole / name)
  written = [p for p in (whole / "model").rglob("*") if p.is_file()]
  for path in written:
    other = run / path.relative_to(whole)
    assert other.read_bytes() == path.read_bytes(), path
  assert len(written) > 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Killed:
  """A run of four processes, of which the second was killed."""

  workdir: pathlib.Path
  ended: list[Ended]
  seconds: float  # from the kill to the last end


@pytest.fixture(scope="module")
def killed(commands, data, tmp_path_factory) -> Killed:
  workdir = tmp_path_factory.mktemp("processes") / "four"
  command = _command(data, workdir, *MESH, UNVALIDATED)
  job = _start(commands, 4, command)
  job.await_file(workdir / "checkpoints" / "8")
  started = time.perf_counter()
  job.processes[1].kill()
  found = job.ended()
  seconds = time.perf_counter() - started
  return Killed(workdir=workdir, ended=found, seconds=seconds)


@pytest.mark.long
def test_a_killed_process_ends_the_others_in_time_and_with_a_line(killed):
  first, second, *others = killed.ended
  assert second.code == -signal.SIGKILL
  assert [one.code for one in (first, *others)] == [5, 5, 5]
  lost = (
    f"process 1 of the job is lost: it is silent for {LOST_AFTER_S} s; the same"
    " command goes on from the last checkpoint"
  )
  assert first.last_line == f"aquila_jax: {lost}"
  for index, one in enumerate(others, start=2):
    assert one.last_line == f"aquila_jax: process {index}: {lost}"
  # Silence, and some rounds of a second at most.
  assert killed.seconds < LOST_AFTER_S + 8


def _newest(killed: Killed) -> pathlib.Path:
  steps = names(killed.workdir / "checkpoints")
  whole = [int(name) for name in steps if name.isdigit()]
  return killed.workdir / "checkpoints" / str(max(whole))


@pytest.mark.long
@pytest.mark.parametrize(
  ("number", "mesh"),
  [
    (1, MeshConfig()),
    (2, MeshConfig(data=1, fsdp=2)),
    (8, MeshConfig(data=2, fsdp=2, tensor=2)),
  ],
)
def test_what_four_processes_saved_is_restored_bit_for_bit(
  killed, data, tmp_path, number, mesh
):
  step = _newest(killed)
  shutil.copytree(step, tmp_path / "checkpoints" / step.name)
  config = json.loads((step / "config" / "metadata").read_text())
  train = config_lib.build(TrainConfig, config["train"], path="train")
  program = make_program(
    config_lib.build(ModelConfig, config["model"], path="model"),
    train,
    mesh=make_mesh(mesh, jax.devices()[:number]),
    total_steps=STEPS,
  )
  with Checkpoints(
    epath.Path(tmp_path / "checkpoints"), config=train.checkpoint
  ) as saved:
    state, progress = saved.restore(program.state, config=config)
  assert int(state.step) == int(step.name)
  stored = array_store.TreeReader(
    epath.Path(step / "state"), _like_of(step / "state")
  )
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  for path, leaf in leaves:
    name = ".".join(["params", *(entry.key for entry in path)])
    np.testing.assert_array_equal(leaf, stored.read(name))
  assert len(leaves) > 8
  # All rows so far, and none twice.
  rows = int(step.name) * BATCH_SIZE
  prepared = PreparedData.open(data)
  position = progress["data_state"]
  assert position["rows"] == rows
  assert sorted(position["tokens"]) == sorted(prepared.sources)
  assert sum(position["tokens"].values()) == rows * SEQUENCE_LENGTH


def _like_of(directory: pathlib.Path):
  """What a checkpoint says that it has, as nested dicts of shapes."""
  tree = {}
  for child in sorted(directory.iterdir()):
    if (child / "zarr.json").exists():
      said = json.loads((child / "zarr.json").read_text())
      leaf = jax.ShapeDtypeStruct(tuple(said["shape"]), said["data_type"])
      node = tree
      *folders, last = child.name.split(".")
      for name in folders:
        node = node.setdefault(name, {})
      node[last] = leaf
  return tree


@pytest.mark.long
@pytest.mark.parametrize(
  ("number", "mesh"),
  [
    (1, ""),
    (2, "--config.mesh.data=1 --config.mesh.fsdp=2"),
    (8, "--config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2"),
  ],
)
def test_what_four_processes_began_one_ends_on_another_mesh(
  commands, data, whole, killed, tmp_path, number, mesh
):
  run = tmp_path / "run"
  shutil.copytree(killed.workdir, run)
  command = _command(data, run, *mesh.split())
  one = succeeded(_with_devices(commands, number).run(*command))
  step = _newest(killed).name
  assert f"dense: going on from step {step}" in one.err.splitlines()
  steps, found = _losses(run / "metrics.jsonl")
  expected_steps, expected = _losses(whole / "metrics.jsonl")
  assert steps == expected_steps
  np.testing.assert_allclose(found, expected, rtol=RTOL)
  # Every batch has a loss of its own.
  losses = np.asarray(_losses(whole / "metrics.jsonl")[1])
  assert np.abs(np.diff(losses)).min() > 2 * RTOL * losses.max()
  positions = [
    json.loads((folder / f"checkpoints/{STEPS}/progress/metadata").read_text())
    for folder in (run, whole)
  ]
  assert positions[0]["data_state"] == positions[1]["data_state"]
  assert positions[0]["data_state"]["rows"] == STEPS * BATCH_SIZE


@pytest.mark.long
def test_a_full_disk_of_one_process_ends_both_with_4(commands, data, tmp_path):
  run = tmp_path / "run"
  job = _start(commands, 2, _command(data, run, UNVALIDATED))
  # No file of the second may be larger than that.
  resource.prlimit(job.processes[1].pid, resource.RLIMIT_FSIZE, (100, 100))
  first, second = job.ended()
  full = (
    f"{run}/checkpoints: step 4 could not be saved: File too large; nothing was"
    " saved before; free some space, and the same command goes on"
  )
  assert (first.code, second.code) == (4, 4)
  assert second.last_line == f"aquila_jax: process 1: {full}"
  assert first.last_line == f"aquila_jax: process 1 has ended: {full}"
  assert not (run / "checkpoints" / "4").exists()


@pytest.mark.parametrize(
  ("last", "message"),
  [
    (
      "--config.stages.dense.train.optimizer.learning_rate=0.5",
      "config.stages.dense.train.optimizer.learning_rate: process 0 has 0.003,"
      " process 1 has 0.5; all need the same command",
    ),
    pytest.param(
      "--nosave_optimizer",
      "--save_optimizer: process 0 has true, process 1 has false; all need the"
      " same command",
      marks=pytest.mark.long,
    ),
  ],
)
def test_commands_that_differ_are_refused(
  commands, data, tmp_path, last, message
):
  command = _command(data, tmp_path / "run")
  first, second = _start(commands, 2, command, last=(last,)).ended()
  assert (first.code, second.code) == (2, 2)
  assert first.last_line == f"aquila_jax: {message}"
  assert second.last_line == f"aquila_jax: process 1: {message}"
  assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_processes_of_different_workdirs_end_in_time(commands, data, tmp_path):
  other = tmp_path / "other"
  job = _start(
    commands,
    2,
    _command(data, tmp_path / "run"),
    last=(f"--workdir={other}",),
  )
  first, second = job.ended()
  message = (
    f"--workdir={str(other)!r}: what process 0 writes there is not seen here;"
    " all processes need one directory, on a shared disk or gs://"
  )
  assert (first.code, second.code) == (2, 2)
  assert second.last_line == f"aquila_jax: process 1: {message}"
  assert first.last_line == f"aquila_jax: process 1 has ended: {message}"
  assert not other.exists()


def test_who_cannot_come_together_is_told_so_in_time(commands, data, tmp_path):
  address = f"localhost:{_free_port()}"
  flags = (f"--coordinator={address}", "--num_processes=2")
  command = _command(data, tmp_path / "run", *flags, "--join_timeout_s=2")
  with socket.create_server(("", 0)) as server:
    taken = server.getsockname()[1]
    found = commands.run_all(
      [
        (*command, "--process_id=1"),
        (
          *_command(data, tmp_path / "run"),
          f"--coordinator=localhost:{taken}",
          "--num_processes=2",
          "--process_id=0",
        ),
      ]
    )
  assert [one.code for one in found] == [2, 2]
  assert found[0].err == (
    f"aquila_jax: --coordinator={address}: process 0 does not answer, 2 s long"
    " (Connection refused); has it started, and can this host reach it?\n"
  )
  assert found[1].err == (
    f"aquila_jax: --coordinator=localhost:{taken}: process 0 cannot listen on"
    f" port {taken}: {os.strerror(errno.EADDRINUSE)}\n"
  )
  with commands.start(*command, "--process_id=0") as process:
    alone = ended(process)
  assert alone.code == 2
  assert alone.last_line == (
    f"aquila_jax: --coordinator={address}: not all of 2 processes have come"
    " within 2 s"
  )
  assert os.listdir(tmp_path) == []


@pytest.mark.long
def test_two_processes_go_back_from_the_same_steps_as_one(
  commands, data, tmp_path
):
  """Half of all steps are spikes here; one process speaks of them."""
  policy = "--config.stages.dense.train.spikes."
  fields = ("spike=rewind", "sigmas=1.0", "window=6", "most_in_a_row=50")
  flags = tuple(policy + field for field in fields)
  runs = tmp_path / "one", tmp_path / "two"
  one = succeeded(
    _with_devices(commands, 2).run(*_command(data, runs[0], *flags))
  )
  job = _start(commands, 2, _command(data, runs[1], *flags))
  first, second = map(succeeded, job.ended())

  def went_back(process: Ended) -> list[str]:
    return [line for line in process.err.splitlines() if "going back" in line]

  assert went_back(first) == went_back(one)
  assert len(went_back(one)) > 2
  assert went_back(second) == []
  assert _rows(runs[0] / "metrics.jsonl") == _rows(runs[1] / "metrics.jsonl")
