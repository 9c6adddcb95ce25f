"""The command `plan compile`, by the TPU's compiler."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _plan(*flags: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "aquila_jax.cli.plan", *flags]
  return subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def _said(tmp_path: pathlib.Path, *flags: str) -> tuple[dict[str, Any], str]:
  """The JSON of a plan that succeeds, and its table."""
  output = tmp_path / "plan.json"
  done = _plan(*flags, f"--output={output}")
  assert done.returncode == 0, done.stderr
  return json.loads(output.read_text()), done.stdout


SMOKE = ("compile", "--config=experiments/configs/smoke.py")


def test_a_mixture_over_experts(tmp_path):
  said, table = _said(
    tmp_path,
    *SMOKE,
    "--stage=scale_out",
    "--topology=v5e:2x2",
    "--config.mesh.expert=2",
  )
  assert said["fits"]
  assert said["mesh"] == dict(data=2, fsdp=1, expert=2, sequence=1, tensor=1)
  kinds = {(one["kind"], *one["axes"]) for one in said["collectives"]}
  assert ("ragged-all-to-all", "expert") in kinds
  # The exact way in its place is not counted.
  assert not any(kind == "collective-permute" for kind, *_ in kinds)
  assert said["seconds"]["kernels"] > 0
  assert said["seconds"]["kernels_without_schedule"] == []
  assert 0 < said["mfu"] < 1
  assert "ragged-all-to-all" in table


def test_tokens_of_a_row_over_devices(tmp_path):
  """A device has the keys and values of a whole row, of its heads alone."""
  said, _ = _said(
    tmp_path,
    *SMOKE,
    "--stage=scale_out",
    "--topology=v5e:2x2",
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.mesh.sequence=2",
  )
  assert said["fits"]
  assert said["mesh"] == dict(data=1, fsdp=2, expert=1, sequence=2, tensor=1)
  assert any("sequence" in one["axes"] for one in said["collectives"])


def test_what_the_compiler_overlaps_is_counted(tmp_path):
  """Gathering of kernels beside compute, where it is asked for."""
  seconds = {}
  for asked in ("True", "False"):
    said, _ = _said(
      tmp_path,
      *SMOKE,
      "--stage=scale_out",
      "--topology=v6e:2x4",
      "--config.mesh.data=1",
      "--config.mesh.fsdp=4",
      "--config.mesh.expert=2",
      "--config.stages.scale_out.train.batch_size=16",
      f"--config.stages.scale_out.train.overlap_collectives={asked}",
    )
    seconds[asked] = said["seconds"]
  asked, not_asked = seconds["True"], seconds["False"]
  assert asked["with_full_overlap"] < asked["as_scheduled"]
  assert asked["as_scheduled"] < asked["without_overlap"]
  assert not_asked["as_scheduled"] == pytest.approx(
    not_asked["without_overlap"], rel=1e-9
  )


def test_axes_may_lie_along_parts_of_a_dimension(tmp_path):
  """Of 4 x 4 chips, 8 and 2; and a dense kernel is gathered, not the tokens."""
  said, _ = _said(
    tmp_path,
    *SMOKE,
    "--stage=scale_up",
    "--topology=v6e:4x4",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=8",
    "--config.stages.scale_up.train.batch_size=16",
  )
  assert said["mesh"]["fsdp"] == 8
  assert said["memory"]["total"] < 2**30
  assert said["fits"]


def test_a_growth_fits(tmp_path):
  said, _ = _said(
    tmp_path,
    "growth",
    "--config=experiments/configs/smoke.py",
    "--stage=scale_out",
    "--topology=v5e:2x2",
  )
  assert said["fits"]
  # Parameters and both moments; more while the training's state is made.
  assert said["placing"] > said["held"] > said["target_bytes"] / 4
  assert said["filling"] > said["held"]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--topology=v9:2x2"], "--topology='v9:2x2': the TPU compiler"),
    (["--topology=v4:2x2x1"], "--topology=v4:2x2x1: of a TPU v4 no rates"),
    (
      ["--topology=v5e:2x2", "--config.mesh.fsdp=3"],
      "config.mesh.fsdp=3 (data=-1, fsdp=3, expert=1, sequence=1, tensor=1):"
      " the product 3 must divide the number of devices, 4; fsdp=2 or 4 would"
      " fit",
    ),
  ],
)
def test_what_does_not_fit_is_refused(flags, message):
  done = _plan(*SMOKE, "--stage=dense", *flags)
  assert done.returncode == 2
  assert f"aquila_jax: {message}" in done.stderr


def test_what_needs_too_much_memory_is_said():
  done = _plan(
    "compile",
    "--config=experiments/configs/aquila_1_8b.py",
    "--topology=v5e:2x2",
    "--config.mesh.data=4",
    "--config.mesh.fsdp=1",
  )
  assert done.returncode == 0, done.stderr
  assert "fits NO Ran out of memory on HBM" in " ".join(done.stdout.split())
  assert "MFU" not in done.stdout
