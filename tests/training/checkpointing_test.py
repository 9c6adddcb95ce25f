from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  CheckpointConfig,
  LossConfig,
  MeshConfig,
  SpikeConfig,
)
from aquila_jax.core.types import TrainState
from aquila_jax.sharding.mesh import make_mesh
from aquila_jax.training import checkpointing, manifest
from aquila_jax.training.checkpointing import (
  Checkpoints,
  check_same,
  saved_config,
)

_ADAM = optax.chain(optax.clip(1.0), optax.scale_by_adam())


def _state(value, *, ema=False, adaptive=False):
  params = {"a": {"w": jnp.full((8, 4), value)}, "b": jnp.full((3,), -value)}
  average = jax.tree.map(lambda x: x + 1, params) if ema else None
  state = TrainState(
    step=jnp.int32(value),
    params=params,
    opt_state=_ADAM.init(params),
    ema=average,
    balance_weights=jnp.full(2, 0.25 * value) if adaptive else None,
  )
  return state


def _abstract(state, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )


@pytest.fixture
def config(tiny):
  return saved_config(
    model=tiny.model(), train=tiny.config(), others={"seed": 1}
  )


@pytest.fixture
def directory(tmp_path):
  return epath.Path(tmp_path) / "checkpoints"


def _save(saved, step, config, loss=None, **fields):
  saved.save(
    step,
    state=_state(float(step), **fields),
    progress={"data": {"rows": step}, "wall_s": 0.1 + step},
    config=config,
    validation=None if loss is None else {"loss": loss},
  )


@pytest.mark.parametrize("every", [False, True])
def test_everything_comes_back(directory, config, every):
  options = dict(ema=every, adaptive=every)
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    assert saved.latest_step is None
    _save(saved, 3, config, **options)
  state = _state(3.0, **options)
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    assert saved.latest_step == 3
    restored, progress = saved.restore(_abstract(state), config=config)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert progress == {"data": {"rows": 3}, "wall_s": 3.1}


def test_leaves_are_zarr3_directories(directory, config):
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    _save(saved, 1, config)
  leaves = {p.parent.name for p in directory.glob("1/state/*/zarr.json")}
  assert leaves == {
    "step",
    "params.a.w",
    "params.b",
    "moments.count",
    "moments.mu.a.w",
    "moments.mu.b",
    "moments.nu.a.w",
    "moments.nu.b",
  }


def test_it_restores_into_other_shardings(directory, config):
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    _save(saved, 2, config)
    mesh = make_mesh(MeshConfig())
    split = jax.sharding.NamedSharding(mesh, jax.P("data"))
    like = _abstract(_state(2.0), jax.sharding.NamedSharding(mesh, jax.P()))
    like.params["a"]["w"] = like.params["a"]["w"].update(sharding=split)
    restored, _ = saved.restore(like, config=config)
  assert restored.params["a"]["w"].sharding == split
  np.testing.assert_array_equal(restored.params["a"]["w"], np.full((8, 4), 2))


def test_the_state_may_be_donated_while_it_is_saved(directory, config):
  double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
  state = _state(1.0)
  state = state.replace(params={"w": jnp.ones((512, 1024))})
  state = state.replace(opt_state=_ADAM.init(state.params))
  like = _abstract(state)
  with Checkpoints(directory, config=CheckpointConfig(keep_last=9)) as saved:
    for step in range(4):
      saved.save(step, state=state, progress={}, config=config)
      state = double(double(state))
      saved.wait()
      restored, _ = saved.restore(like, config=config)
      assert set(np.unique(restored.params["w"])) == {4.0**step}


@pytest.mark.parametrize(
  "keep_last, keep_best, kept",
  [(1, 0, [6]), (3, 0, [4, 5, 6]), (1, 1, [2, 6]), (2, 2, [2, 4, 5, 6])],
)
def test_the_last_and_the_best_are_kept(
  directory, config, keep_last, keep_best, kept
):
  rules = CheckpointConfig(keep_last=keep_last, keep_best=keep_best)
  losses = {1: 3.0, 2: 1.0, 4: 2.0}
  with Checkpoints(directory, config=rules) as saved:
    for step in range(1, 4):
      _save(saved, step, config, losses.get(step))
  # What was best before a restart stays so.
  with Checkpoints(directory, config=rules) as saved:
    for step in range(4, 7):
      _save(saved, step, config, losses.get(step))
    saved.wait()
    names = {p.name for p in directory.iterdir()} - {"removed"}
    assert sorted(map(int, names)) == kept
    assert saved.losses == {s: losses[s] for s in kept if s in losses}


def test_another_config_is_refused_with_all_differences(
  directory, config, tiny
):
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    _save(saved, 2, config)
    other = saved_config(
      model=tiny.model(mlp_dim=32),
      train=tiny.config(batch_size=4),
      others={"seed": 2},
    )
    with pytest.raises(errors.UserError) as error:
      saved.restore(
        _abstract(_state(2.0)), config=other, path="config.stages.a"
      )
  assert str(error.value) == (
    f"{directory}/2 was made with another config; use another workdir, or"
    " change back: config.stages.a.model.mlp_dim: 24 -> 32;"
    " config.stages.a.seed: 1 -> 2; config.stages.a.train.batch_size: 8 -> 4"
  )


def test_harmless_fields_may_change(directory, config, tiny):
  other = saved_config(
    model=tiny.model(),
    train=tiny.config(
      log_every=7,
      evaluate_every=3,
      evaluate_tokens=5,
      watchdog_s=7.0,
      checkpoint=CheckpointConfig(every_steps=3, keep_last=5),
    ),
    others={"seed": 1},
  )
  assert other != config
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    _save(saved, 2, config)
    restored, _ = saved.restore(_abstract(_state(2.0)), config=other)
  assert int(restored.step) == 2


def test_a_checkpoint_of_before_there_were_growth_masks_fits(directory, config):
  old = copy.deepcopy(config)
  del old["train"]["mask_steps"], old["model"]["growth_mask"]
  check_same(old, config, what=directory, path="config.stages.a")


def test_a_checkpoint_of_before_spikes_were_watched_for_fits(
  directory, config, tiny
):
  old = copy.deepcopy(config)
  del old["train"]["spikes"]
  check_same(old, config, what=directory, path="config.stages.a")
  watched = saved_config(
    model=tiny.model(),
    train=tiny.config(spikes=SpikeConfig(spike="skip")),
    others={"seed": 1},
  )
  with pytest.raises(
    errors.UserError, match="spikes.spike: 'ignore' -> 'skip'"
  ):
    check_same(old, watched, what=directory, path="config.stages.a")


def test_a_checkpoint_of_before_routing_had_options_fits(tiny):
  moe = ("gate_scale", "choice", "selection_bias", "logit_normalisation")
  moe += ("num_groups", "top_groups", "group_score", "input_jitter")
  loss = ("balance_over", "adaptive_balance", "bias_rate")

  def differences(**fields):
    now = saved_config(model=tiny.moe(), train=tiny.config(**fields), others={})
    old = copy.deepcopy(now)
    for name in (*moe, "logit_noise"):
      del old["model"]["moe"][name]
    for name in loss:
      del old["train"]["loss"][name]
    try:
      check_same(old, now, what=epath.Path("it"), path="config")
    except errors.UserError as error:
      return str(error).rsplit(": ", 2)[1:]

  assert differences() is None
  # Under accumulation the loss was another one.
  assert differences(num_microbatches=2) == [
    "config.train.loss.balance_over",
    "'micro_batch' -> 'global'",
  ]
  before = LossConfig(balance_over="micro_batch")
  assert differences(num_microbatches=2, loss=before) is None


def _flip(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(bytes(content))


def test_damaged_steps_are_neither_restored_nor_among_the_best(
  directory, config
):
  rules = CheckpointConfig(keep_last=3, keep_best=2)
  with Checkpoints(directory, config=rules) as saved:
    for step, loss in ((1, 1.0), (2, 2.0), (3, None), (4, 3.0)):
      _save(saved, step, config, loss)
  _flip(directory / "1/metrics/metrics")
  _flip(directory / "4/state/params.b/c/0")
  with Checkpoints(directory, config=rules) as saved:
    assert (saved.latest_step, saved.losses) == (3, {2: 2.0})
    state, progress = saved.restore(_abstract(_state(3.0)), config=config)
    jax.tree.map(np.testing.assert_array_equal, state, _state(3.0))
    assert progress["data"] == {"rows": 3}
    # What was moved aside can be saved, and damaged, again.
    _save(saved, 4, config, 3.5)
    saved.wait()
    assert saved.losses == {2: 2.0, 4: 3.5}
  _flip(directory / "4/progress/metadata")
  with Checkpoints(directory, config=rules) as saved:
    assert saved.latest_step == 3
  aside = directory.parent / "damaged_checkpoints"
  assert sorted(p.name for p in aside.iterdir()) == ["1", "4", "4.2"]


def test_a_kill_while_a_step_is_removed_leaves_no_damaged_one(
  directory, config, monkeypatch
):
  def killed(self):
    next(iter(self.glob("*/progress"))).rename(self / "half")

  rules = CheckpointConfig(keep_last=1)
  with monkeypatch.context() as patch:
    with Checkpoints(directory, config=rules) as saved:
      _save(saved, 1, config)
      saved.wait()
      patch.setattr(type(directory), "rmtree", killed)
      _save(saved, 2, config)
  assert sorted(p.name for p in directory.iterdir()) == ["2", "removed"]
  with Checkpoints(directory, config=rules) as saved:
    assert saved.latest_step == 2
  assert [p.name for p in directory.iterdir()] == ["2"]
  assert not (directory.parent / "damaged_checkpoints").exists()


def test_every_file_of_a_step_is_in_its_manifest(directory, config):
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    _save(saved, 1, config, 1.0)
  files = {
    path.relative_to(directory / "1").as_posix()
    for folder, _, names in (directory / "1").walk()
    for path in (folder / name for name in names)
  }
  listed = json.loads((directory / "1/MANIFEST.json").read_text())["files"]
  assert files - listed.keys() == {
    "MANIFEST.json",
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
  }
  assert {"metrics/metrics", "progress/metadata", "config/metadata"} <= files


def test_without_a_rename_a_marker_behind_the_manifest_commits_a_step(
  directory, config, monkeypatch
):
  """As on gs://, where Orbax chooses this way by itself."""
  monkeypatch.setattr(
    checkpointing.ocp,
    "CheckpointManagerOptions",
    functools.partial(
      ocp.CheckpointManagerOptions,
      atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE),
    ),
  )
  names = []
  write = manifest.write

  def noted(step):
    names.append(step.name)
    # All files are there, and the step does not yet count.
    assert (step / "state" / "_METADATA").exists()
    assert not (step / "commit_success.txt").exists()
    write(step)

  monkeypatch.setattr(manifest, "write", noted)
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    for step in (1, 2):
      _save(saved, step, config)
      saved.wait()
  assert names == ["1", "2"]  # in its place from the beginning
  assert manifest.fault(directory / "1") is None
  # Killed between the manifest and the marker.
  (directory / "2" / "commit_success.txt").unlink()
  assert manifest.fault(directory / "2") == "commit_success.txt is missing"
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    assert saved.latest_step == 1
    restored, progress = saved.restore(_abstract(_state(1.0)), config=config)
    assert progress["data"] == {"rows": 1}
    jax.tree.map(np.testing.assert_array_equal, restored, _state(1.0))
    _save(saved, 2, config)
  assert manifest.fault(directory / "2") is None


def test_a_checkpoint_of_before_there_were_manifests_is_trusted(
  directory, config, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(manifest, "write", lambda step: None)
    patch.setattr(manifest, "MARK", {})
    with Checkpoints(directory, config=CheckpointConfig()) as saved:
      _save(saved, 1, config)
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    assert saved.latest_step == 1
    _save(saved, 2, config)
  # A step that should have a manifest is not taken for one of those.
  (directory / "2/MANIFEST.json").unlink()
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    assert saved.latest_step == 1


def test_a_save_that_fails_for_another_reason_is_a_fault(
  directory, config, monkeypatch
):
  def fail(step):
    raise PermissionError(13, "Permission denied", "file")

  monkeypatch.setattr(manifest, "write", fail)
  with pytest.raises(PermissionError):
    with Checkpoints(directory, config=CheckpointConfig()) as saved:
      _save(saved, 1, config)
      for _ in range(1000):
        saved.check()
        time.sleep(0.01)


# Saves step 1 whole, then is killed as soon as step 2 stands half-written.
_KILLED = """
import os, sys, jax.numpy as jnp, optax
from etils import epath
from aquila_jax.core.experiment_config import CheckpointConfig
from aquila_jax.core.types import TrainState
from aquila_jax.training.checkpointing import Checkpoints

params = {"w": jnp.ones((2048, 2048))}
state = TrainState(
  step=jnp.int32(1), params=params, opt_state=optax.scale_by_adam().init(params)
)
directory = epath.Path(sys.argv[1])
saved = Checkpoints(directory, config=CheckpointConfig())
config = {"train": {}}
saved.save(1, state=state, progress={"n": 1}, config=config)
saved.wait()
saved.save(2, state=state, progress={"n": 2}, config=config)
while not any("tmp" in child.name for child in directory.iterdir()):
  pass
os.kill(os.getpid(), 9)
"""


def test_kill_9_leaves_whole_steps_and_the_next_start_cleans_up(directory):
  killed = subprocess.run(
    [sys.executable, "-c", _KILLED, str(directory)],
    env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    check=False,
  )
  assert killed.returncode == -9, killed.stderr.decode()
  assert any("tmp" in child.name for child in directory.iterdir())
  params = {"w": jnp.ones((2048, 2048))}
  state = TrainState(
    step=jnp.int32(1),
    params=params,
    opt_state=optax.scale_by_adam().init(params),
  )
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    assert [child.name for child in directory.iterdir()] == ["1"]
    assert saved.latest_step == 1
    restored, progress = saved.restore(_abstract(state), config={"train": {}})
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert progress == {"n": 1}


def test_a_save_that_a_second_ctrl_c_left_running_is_waited_for(
  directory, config, monkeypatch
):
  """In a notebook, where the process lives on."""
  write = Checkpoints._write_manifest

  def slowly(saved):
    time.sleep(0.5)
    write(saved)

  monkeypatch.setattr(Checkpoints, "_write_manifest", slowly)
  with pytest.raises(KeyboardInterrupt):
    with Checkpoints(directory, config=CheckpointConfig()) as saved:
      _save(saved, 1, config)
      raise KeyboardInterrupt
  state = _state(1.0)
  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    restored, _ = saved.restore(_abstract(state), config=config)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_save_that_fails_after_its_run_is_left_alone(
  directory, config, monkeypatch, caplog
):
  def fail(saved):
    del saved
    time.sleep(0.2)
    raise OSError("gone")

  with Checkpoints(directory, config=CheckpointConfig()) as saved:
    _save(saved, 1, config)
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "_write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
      with Checkpoints(directory, config=CheckpointConfig()) as saved:
        _save(saved, 2, config)
        raise KeyboardInterrupt
    # It ends while the next one begins.
    with Checkpoints(directory, config=CheckpointConfig()) as saved:
      assert saved.latest_step == 1
  assert "a save has failed late: " in caplog.text
