from __future__ import annotations

import dataclasses
import json

import numpy as np
from etils import epath

from aquila_jax.training.metrics import read_rows
from tests.cli import tiny
from tests.cli.commands import SMOKE, names, succeeded

STEPS = 3
SHORT = (
  SMOKE,
  "--stage=dense",
  f"--config.stages.dense.train.steps={STEPS}",
  "--config.stages.dense.train.optimizer.warmup_steps=1",
  "--config.stages.dense.train.evaluate_every=0",
)


def test_it_goes_on_from_a_model(commands, dense, data, tmp_path):
  workdir = tmp_path / "run"
  command = ("train", *SHORT, f"--config.data.prepared={data}")
  command += (f"--workdir={workdir}", f"--init_from={dense}")
  trained = succeeded(commands.run(*command, "--profile_steps=1,2"))
  assert trained.out == f"MODEL: {workdir}/model\n"
  lines = trained.err.splitlines()
  assert "dense: 31.0K to 31.0K parameters, 3 steps, 1.5K tokens" in lines
  assert "dense: the optimizer state goes on from step 7" in lines
  assert f"wrote a profile to {workdir}/profile" in lines
  traces = list((workdir / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1 and traces[0].stat().st_size > 0

  source, model = tiny.load(dense), tiny.load(workdir / "model")
  assert model.moments is not None
  assert int(np.asarray(model.moments.count)) == tiny.COUNT + STEPS
  assert model.lineage.steps == tiny.COUNT + STEPS
  assert model.lineage.events[0] == source.lineage.events[0]
  rows = read_rows(epath.Path(workdir / "metrics.jsonl"))
  assert [row["step"] for row in rows] == [STEPS]
  resolved = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
  assert resolved["stages"]["dense"]["init"] == {
    "kind": "load",
    "path": str(dense),
  }

  # Once more: there is nothing to do, and nothing is done.
  stamps = {p: p.stat().st_mtime_ns for p in (workdir / "model").rglob("*")}
  again = commands.run(*command)
  other = commands.run(*command, "--config.stages.dense.train.batch_size=4")
  assert (again.code, again.out) == (0, trained.out)
  assert again.err == "dense: done\n"
  assert (other.code, other.out) == (2, "")
  assert other.err == (
    f"aquila_jax: {workdir}/stage.json was made with another config; use"
    " another workdir, or change back: config.stages.dense.train.batch_size:"
    " 8 -> 4\n"
  )
  assert {
    p: p.stat().st_mtime_ns for p in (workdir / "model").rglob("*")
  } == stamps


def test_optimizer_state_is_neither_needed_nor_kept(
  commands, dense, data, tmp_path
):
  lean, workdir = tmp_path / "lean", tmp_path / "run"
  tiny.save(lean, dataclasses.replace(tiny.load(dense), moments=None))
  trained = succeeded(
    commands.run(
      "train",
      *SHORT,
      f"--config.data.prepared={data}",
      f"--workdir={workdir}",
      f"--init_from={lean}",
      "--nosave_optimizer",
    )
  )
  assert "dense: Adam starts afresh" in trained.err.splitlines()
  assert names(workdir / "model") == ["config.json", "params", "tokenizer.json"]
  assert tiny.load(workdir / "model").moments is None
  assert not (workdir / "profile").exists()


def test_mistakes_are_refused(commands, dense, data, tmp_path):
  (tmp_path / "file").write_text("")
  workdir = f"--workdir={tmp_path / 'run'}"
  command = ("train", SMOKE, f"--config.data.prepared={data}", workdir)
  load = (*command, "--stage=dense", f"--init_from={dense}")
  wrong = dense.parent / "dens"
  small = tmp_path / "small"
  model = tiny.load(dense)
  tiny.save(small, dataclasses.replace(model, tokenizer="{}"))
  commands.assert_refused(
    {
      "a stage that grows": (
        (*command, "--stage=scale_up"),
        "--stage=scale_up: it grows from the stage 'dense'; give"
        " --init_from=MODEL with a model that scale_up or scale_out has grown,"
        " or run efficient_scale",
      ),
      "a MODEL that is missing": (
        (*command, "--stage=dense", f"--init_from={wrong}"),
        f"config.stages.dense.init.path={str(wrong)!r}: there is no such"
        f" directory; did you mean {str(dense)!r}?",
      ),
      "a MODEL of another architecture": (
        (*load, "--config.stages.dense.model.num_layers=3"),
        "config.stages.dense.model.num_layers=3: the MODEL has 2; a stage that"
        " loads a MODEL takes it as it is",
      ),
      "a MODEL of another tokenizer": (
        (*command, "--stage=dense", f"--init_from={small}"),
        f"config.stages.dense.init.path={str(small)!r}: its tokenizer is not"
        " the data's; give"
        f" config.data.tokenizer.path='{small}/tokenizer.json' and prepare the"
        " data with it",
      ),
      "steps that are no numbers": (
        (*load, "--profile_steps=one"),
        "--profile_steps=one: expected two steps, as in 10,15",
      ),
      "a workdir that is a file": (
        (
          "train",
          SMOKE,
          "--stage=dense",
          f"--config.data.prepared={data}",
          f"--workdir={tmp_path / 'file'}",
        ),
        f"--workdir={str(tmp_path / 'file')!r}: cannot be made: File exists",
      ),
    }
  )
  assert names(tmp_path) == ["file", "run", "small"]
  assert names(tmp_path / "run") == []
