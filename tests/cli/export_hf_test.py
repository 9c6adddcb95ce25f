from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from tests.cli import tiny
from tests.cli.commands import ROOT, names
from tests.interop import tiny as checkpoints


def test_it_writes_what_imports_as_the_same_model(commands, dense, tmp_path):
  out, half = tmp_path / "out", tmp_path / "half"
  found = commands.run_all(
    [
      ("export_hf", f"--source={dense}", f"--output={out}"),
      (
        *("export_hf", f"--source={dense}", f"--output={half}"),
        *("--dtype=bfloat16", "--max_shard_size=50KB"),
      ),
    ]
  )
  model = tiny.load(dense)
  tokens = json.loads(model.tokenizer or "")["added_tokens"]
  end = next(t["id"] for t in tokens if t["content"] == "<|endoftext|>")
  assert found[0].code == 0, found[0].err
  # 2 layers of 4 kernels, 3 biases, 3 matrices of the FFN and 2 norms; a table
  # and a last norm.
  assert found[0].err == "model.safetensors: 26 tensors\n"
  size = sum(file.stat().st_size for file in half.glob("*.safetensors"))
  assert found[0].out.startswith(f"{out}: Qwen2ForCausalLM, 26 tensors, ")
  assert found[0].out.endswith(" bytes in 1 file\n")
  count = len(list(half.glob("*.safetensors")))
  assert count > 1
  assert found[1].out.endswith(f" bytes in {count} files\n")
  assert size < 1.2 * (out / "model.safetensors").stat().st_size / 2
  read = json.loads((out / "config.json").read_text())
  assert (read["eos_token_id"], read["torch_dtype"]) == (end, "float32")
  back = checkpoints.imported(out, tmp_path / "back")
  tiny.assert_same(back.params, model.params)
  assert back.config == model.config
  # What ends a text is the tokenizer's end of text, now by its id.
  assert back.stop_tokens == (end,)
  assert back.tokenizer == model.tokenizer
  assert back.lineage.events[:-1] == model.lineage.events


def test_mistakes_are_refused_and_leave_nothing(commands, dense, tmp_path):
  config = dataclasses.replace(
    tiny.dense_config(), out_bias=True, sliding_window=5
  )
  special = tmp_path / "special"
  tiny.save(special, tiny.untrained(config, checkpoints.tokenizer_json()))
  output = f"--output={tmp_path / 'new'}"
  before = names(tmp_path)
  commands.assert_refused(
    {
      "a size that is none": (
        (
          *("export_hf", f"--source={dense}", output),
          "--max_shard_size=2 parrots",
        ),
        "--max_shard_size='2 parrots': expected a size, as in 500MB or 5GB",
      ),
      "what no class computes": (
        ("export_hf", f"--source={special}", output),
        "model.sliding_window=5: the stock class with out_bias and no qk_norm,"
        " Llama, has no window; expected None",
      ),
    }
  )
  assert names(tmp_path) == before


_SIZES = """
import json, sys
from aquila_jax.cli import export_hf
from aquila_jax.core.errors import UserError
found = []
for text in json.loads(sys.argv[1]):
  try:
    found.append(export_hf.parse_size(text))
  except UserError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_sizes_are_decimal():
  """In a process of its own, as every command's flags are."""
  sizes = {
    "1": 1,
    "1B": 1,
    "2GB": 2 * 10**9,
    "500MB": 5 * 10**8,
    "1.5 kb": 1500,
    " 3TB ": 3 * 10**12,
  }
  wrong = ["", "0", "0.2", "GB", "-1GB", "1XB", "1GBs", "1e3"]
  ended = subprocess.run(
    [sys.executable, "-c", _SIZES, json.dumps([*sizes, *wrong])],
    capture_output=True,
    check=True,
    cwd=ROOT,
    text=True,
  )
  assert json.loads(ended.stdout) == [
    *sizes.values(),
    *(
      f"--max_shard_size={text!r}: expected a size, as in 500MB or 5GB"
      for text in wrong
    ),
  ]
