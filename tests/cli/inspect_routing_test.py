from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.model_dir import StoredModel, read_tokenizer
from tests import brief
from tests.cli import tiny
from tests.cli.commands import ROOT, names, succeeded
from tests.evaluation.parsed_page import Page
from tests.growth.tiny import params as random_params

TEXT = "experiments/data/smoke/en.txt"
# Every case is a command line; what is printed is a list of their messages.
_MANY = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from aquila_jax.cli import inspect_routing
from aquila_jax.core import errors

found = []
for case in json.loads(sys.argv[1]):
  with flagsaver.flagsaver():
    flags.FLAGS(["inspect_routing", *case])
    try:
      inspect_routing.main()
      found.append("")
    except errors.UserError as error:
      found.append(str(error))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def mixture(dense) -> pathlib.Path:
  """A MODEL that says that it was made of `dense`, which it was not."""
  config = dataclasses.replace(
    tiny.dense_config(), moe=MoeConfig(num_experts=4, top_k=2, layers=(1,))
  )
  event = Event(kind="scale_out", parent=str(dense))
  model = StoredModel(
    config=config,
    lineage=Lineage(events=(event,)),
    params=random_params(config),
    tokenizer=read_tokenizer(dense),
  )
  path = dense.parent / "mixture"
  tiny.save(path, model)
  tiny.save(dense.parent / "bytes", dataclasses.replace(model, tokenizer=None))
  return path


def test_it_writes_a_page_and_the_numbers(commands, mixture, data, tmp_path):
  page = tmp_path / "new" / "page.html"
  found = succeeded(
    commands.run(
      "inspect_routing",
      f"--model={mixture}",
      f"--data={data}",
      f"--output={page}",
      "--json",
      "--max_tokens=200",
      "--split=validation",
      "--batch_size=4",
    )
  )
  assert names(page.parent) == ["page.html", "page.json"]
  record = json.loads((page.parent / "page.json").read_text(encoding="utf-8"))
  assert record["domains"] == {"en": 200, "zh": 200}
  (layer,) = record["layers"]
  assert (layer["layer"], record["num_layers"]) == (1, 2)
  assert sum(layer["load"]) == pytest.approx(1)
  assert found.out == (
    f"{page}: 400 tokens; the busiest expert of layer 1 has"
    f" {layer['load_max_over_mean']:.2f} times an even share; dead experts:"
    " none\n"
  )
  assert f"reading the validation split of {data}\n" in found.err
  parsed = Page(page.read_text(encoding="utf-8"))
  assert f"The parent is {mixture.parent / 'dense'}, and" in parsed.text


def test_mistakes_are_refused_and_bytes_are_read(
  commands, mixture, dense, data, tmp_path
):
  model, text = f"--model={mixture}", f"--text={TEXT}"
  taken = tmp_path / "taken.html"
  taken.write_text("")
  (tmp_path / "page.json").write_text("{}")
  (tmp_path / "empty").write_text("")
  output = f"--output={tmp_path / 'out.html'}"
  in_bytes = mixture.parent / "bytes"
  commands.assert_refused(
    {
      "a dense model": (
        ("inspect_routing", f"--model={dense}", text, output),
        f"--model={str(dense)!r}: it is dense, and has no experts to inspect",
      ),
    }
  )
  cases = {
    "give --data or --text, and not both": [model, output],
    "give --data or --text, and not both ": [model, text, f"--data={data}"],
    f"--output={str(taken)!r}: it exists; choose another": [
      model,
      text,
      f"--output={taken}",
    ],
    f"--output='{tmp_path}/page.html': --json writes '{tmp_path}/page.json'"
    " beside it, and that exists; choose another": [
      model,
      text,
      f"--output={tmp_path}/page.html",
      "--json",
    ],
    f"--output='{tmp_path}/a.json': --json writes that file; expected .html": [
      model,
      text,
      f"--output={tmp_path}/a.json",
      "--json",
    ],
    f"--parent={str(data)!r} is not a MODEL directory: it has no config.json": [
      model,
      text,
      output,
      f"--parent={data}",
    ],
    f"--data={str(data)!r}: the MODEL has no tokenizer.json to compare with"
    " its own; give --text": [f"--model={in_bytes}", f"--data={data}", output],
    "--language='fr' is unknown; valid: en, zh": [
      model,
      f"--data={data}",
      output,
      "--language=en,fr",
    ],
    "--split=train: is of --data; this reads --text": [
      model,
      text,
      output,
      "--split=train",
    ],
    "--text='zh:': expected a file, or domain:file": [
      model,
      "--text=zh:",
      output,
    ],
    f"--text='{tmp_path}/empty': there is no text in it": [
      f"--model={in_bytes}",
      f"--text={tmp_path}/empty",
      output,
    ],
    "--text='gone': cannot be read: [Errno 2] No such file or directory:"
    " 'gone'": [model, "--text=gone", output],
    "--sequence_length=65: expected at most the model's context_length=64": [
      model,
      text,
      output,
      "--sequence_length=65",
    ],
  }
  good = [
    f"--model={in_bytes}",
    f"{text},zh:experiments/data/smoke/zh.txt",
    output,
    "--max_tokens=150",
    "--parent=",
    "--min_count=5",
  ]
  process = subprocess.run(
    [sys.executable, "-c", _MANY, json.dumps([*cases.values(), good])],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": brief.XLA_FLAGS},
    capture_output=True,
    text=True,
    check=True,
  )
  said, messages = process.stdout.splitlines()
  expected = [message.strip() for message in cases]
  assert json.loads(messages) == [*expected, ""]
  assert said.startswith(f"{tmp_path}/out.html: 300 tokens; ")
  # Nothing of those that were refused.
  assert names(tmp_path) == ["empty", "out.html", "page.json", "taken.html"]
  page = Page((tmp_path / "out.html").read_text(encoding="utf-8")).text
  assert "tokens by domain: en.txt 150, zh 150." in page
  assert "byte fragment" in page and "No parent was asked for." in page
