from __future__ import annotations

import dataclasses

import numpy as np

from aquila_jax.core.lineage import Event
from tests.cli import tiny
from tests.cli.commands import Ended, names
from tests.interop import gguf_kit
from tests.interop import tiny as checkpoints


def test_it_writes_what_the_library_imports(commands, tmp_path):
  source = checkpoints.REFERENCES / "qwen2"
  tokenizer = tmp_path / "tokenizer.json"
  tokenizer.write_text(checkpoints.tokenizer_json())
  file = gguf_kit.write_reference(
    tmp_path / "model.gguf", "qwen2", qwen2__new__key=3
  )
  wide, half = tmp_path / "wide", tmp_path / "half"
  found = commands.run_all(
    [
      (
        *("import_hf", f"--source={source}", f"--output={wide}"),
        *("--param_dtype=float32", f"--tokenizer={tokenizer}"),
      ),
      (
        *("import_hf", f"--source={file}", f"--output={half}"),
        "--param_dtype=bfloat16",
      ),
    ]
  )
  # V=61, D=16, F=24, N=4, K=2, H=4: embedding and head 2 * 976; a layer 2 *
  # 256 + 2 * 128 of attention and 16 + 8 + 8 biases, 3 * 384 of the FFN, norms
  # 32; a last norm 16.
  assert 2 * 976 + 2 * (2 * 256 + 2 * 128 + 32 + 3 * 384 + 32) + 16 == 5936
  said = (
    "qwen2, 5.9K parameters, trained 0 steps on 0 tokens, without optimizer"
    " state"
  )
  assert found[0] == Ended(code=0, out=f"{wide}: {said}\n", err="")
  assert found[1] == Ended(
    code=0,
    out=f"{half}: {said}\n",
    err="not understood, and left out: new.key\n"
    "the source has no tokenizer.json, and the MODEL has none;"
    " --tokenizer=FILE gives it one\n",
  )
  expected = checkpoints.imported(source, tmp_path / "own", dtype="float32")
  loaded = tiny.load(wide)
  tiny.assert_same(loaded.params, expected.params)
  assert loaded.config == expected.config
  assert loaded.tokenizer == checkpoints.tokenizer_json()
  assert loaded.lineage.events == (
    Event(kind="import", parent=str(source), options={"family": "qwen2"}),
  )
  # The reference's own weights are bfloat16.
  loaded = tiny.load(half)
  assert loaded.config == dataclasses.replace(
    expected.config,
    init_std=0.02,
    param_dtype="bfloat16",
    compute_dtype="bfloat16",
  )
  checkpoints.assert_same(
    loaded.params,
    checkpoints.imported(source, tmp_path / "own half").params,
  )


def test_mistakes_are_refused_and_leave_nothing(commands, tmp_path):
  def damage(held):
    del held["model.norm.weight"]
    held["vision.weight"] = np.ones(3, np.float32)

  source = checkpoints.copy_of("llama", tmp_path / "damaged", tensors=damage)
  missing, bad = tmp_path / "missing", tmp_path / "bad.json"
  bad.write_text("{}")
  output = f"--output={tmp_path / 'new'}"
  before = names(tmp_path)
  commands.assert_refused(
    {
      "a wrong path": (
        ("import_hf", f"--source={missing}", output),
        f"--source={str(missing)!r}: there is no such file",
      ),
      "a tokenizer that is none": (
        ("import_hf", f"--source={source}", output, f"--tokenizer={bad}"),
        f"--tokenizer={str(bad)!r}: cannot be read (Model missing. at line 1"
        " column 2); expected a tokenizer.json",
      ),
      "tensors that do not fit": (
        ("import_hf", f"--source={source}", output),
        f"{source}: 2 problems\n"
        "  model.norm.weight: is missing; expected shape [16]\n"
        "  vision.weight: is unexpected; in model.safetensors",
      ),
    }
  )
  assert names(tmp_path) == before


def test_the_model_is_one_like_any_other(commands, tmp_path):
  """But for its tokenizer, where it came without one."""
  model = tmp_path / "model"
  checkpoints.imported(checkpoints.REFERENCES / "llama", model)
  one = commands.run("generate", f"--model={model}", "--prompt=a")
  assert one == Ended(
    code=2,
    out="",
    err="aquila_jax: the MODEL has no tokenizer.json; import it again with"
    " --tokenizer\n",
  )
