"""The command `plan`, as far as it needs no compiler."""

from __future__ import annotations

import json

from tests.cli.commands import SMOKE, succeeded

POD = ("--stage=scale_out", "--topology=v5e:2x2", "--config.mesh.expert=2")


def test_memory_and_search(commands, tmp_path):
  first, second = tmp_path / "memory.json", tmp_path / "search.json"
  third = tmp_path / "export.json"
  memory, search, export = map(
    succeeded,
    commands.run_all(
      [
        ("plan", "memory", SMOKE, *POD, f"--output={first}"),
        (
          "plan",
          "search",
          SMOKE,
          "--stage=dense",
          "--config.seed=3",
          "--kind=v6e",
          "--devices=8",
          "--best=3",
          f"--output={second}",
        ),
        ("plan", "export", SMOKE, "--stage=scale_out", f"--output={third}"),
      ]
    ),
  )
  said = json.loads(first.read_text())
  assert said["mesh"] == dict(data=2, fsdp=1, expert=2, sequence=1, tensor=1)
  assert said["fits"]
  held = said["memory"]
  assert held["total"] == (
    held["parameters"] + held["optimizer"] + held["batch"] + held["temporaries"]
  )
  assert "scale_out on v5e:2x2: 4 of TPU v5 lite" in memory.out
  assert "together" in memory.out
  rows = json.loads(second.read_text())
  assert len(rows) == 3
  assert [row["topology"] for row in rows] == ["v6e:2x4"] * 3
  times = [row["seconds"]["without_overlap"] for row in rows]
  assert times == sorted(times)
  sizes = rows[0]["mesh"]
  command = rows[0]["command"]
  assert f"--config.mesh.fsdp={sizes['fsdp']}" in command
  assert "plan compile --config=experiments/configs/smoke.py" in command
  assert "--config.seed=3" in command
  assert command in search.out
  written = json.loads(third.read_text())
  half, whole = (written["dtypes"][name] for name in ("bfloat16", "float32"))
  assert whole["num_bytes"] == 2 * half["num_bytes"] >= written["read"]
  assert "the export of scale_out, Qwen2MoeForCausalLM" in export.out


def test_mistakes_are_refused(commands):
  commands.assert_refused(
    {
      "no verb": (
        ("plan", SMOKE, "--topology=v5e:2x2"),
        "nothing: expected `plan compile`, `plan memory`, `plan search`, `plan"
        " growth`, `plan export`, then flags",
      ),
      "no pod": (
        ("plan", "memory", SMOKE, "--stage=dense"),
        "--topology=: expected it, or --kind and --devices",
      ),
      "two pods": (
        ("plan", "memory", SMOKE, "--stage=dense", "--topology=v5e:2x2")
        + ("--devices=4",),
        "--topology=v5e:2x2: and --kind or --devices are given; expected one of"
        " the two ways",
      ),
      "no kind": (
        ("plan", "search", SMOKE, "--stage=dense", "--devices=4"),
        "--kind=: of nothing no rates are known here; expected one of v5e, v5p,"
        " v6e",
      ),
      "another topology": (
        ("plan", "memory", SMOKE, "--stage=dense", "--topology=v5p:4"),
        "--topology=v5p:4: expected a kind and chips along each dimension, as"
        " v5p:4x4x8 or v6e:16x16",
      ),
      "a batch that is not divided": (
        ("plan", "memory", SMOKE, "--stage=dense", "--topology=v5e:4x4"),
        "config.stages.dense.train.batch_size=8: expected a multiple of 16, 1"
        " microbatches spread over 16 devices; the nearest is 16",
      ),
      "no growth": (
        ("plan", "growth", SMOKE, "--stage=dense", "--topology=v5e:4x4"),
        "config.stages.dense.init.kind='scratch': expected scale_up or"
        " scale_out, for a plan of growth",
      ),
      "nowhere to write": (
        ("plan", "memory", SMOKE, "--stage=dense", "--topology=v5e:2x2")
        + ("--output=no/where.json",),
        "--output=no/where.json: no is not a directory",
      ),
      "a folder to write": (
        ("plan", "memory", SMOKE, "--stage=dense", "--topology=v5e:2x2")
        + ("--output=experiments",),
        "--output=experiments: expected a file",
      ),
      "a device to write": (
        ("plan", "memory", SMOKE, "--stage=dense", "--topology=v5e:2x2")
        + ("--output=/dev/null",),
        "--output=/dev/null: expected a file",
      ),
      "chips that divide no batch": (
        ("plan", "search", SMOKE, "--stage=dense", "--kind=v5e")
        + ("--devices=7",),
        "--topology=v5e:1x7: by no mesh, microbatches and remat does dense fit;"
        " expected more chips, or a batch of which they divide the rows",
      ),
    }
  )
