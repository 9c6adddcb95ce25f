"""The command as users run it, on the same model and on one that is not."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aquila_jax.interop import import_model
from tests.parity import tiny_models

_CHANGED = "model.layers.1.mlp.down_proj.weight"


def _run(*arguments: object) -> tuple[int, list[str]]:
  done = subprocess.run(
    [sys.executable, "-m", "aquila_jax.cli.compare_hf", *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert "Traceback" not in done.stderr, done.stderr
  return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def models_of_bytes(tmp_path_factory):
  """A MODEL, its source, and a copy of that with one weight changed."""
  path = tmp_path_factory.mktemp("command")
  tiny_models.build("Llama", {}, path / "source")
  tiny_models.build("Llama", {}, path / "changed")
  file = path / "changed" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors[_CHANGED] = tensors[_CHANGED].copy()
  tensors[_CHANGED][3, 7] += np.float32(0.05)
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(
    models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  import_model.import_model(
    import_model.open_checkpoint(path / "source"),
    path / "model",
    parent="source",
    tokenizer=tokenizer.to_str(),
    progress=print,
  )
  return path


def test_agreement_is_exit_code_0(models_of_bytes, tmp_path):
  code, lines = _run(
    f"--model={models_of_bytes / 'model'}",
    f"--reference={models_of_bytes / 'source'}",
    "--text=The river rose.",
    "--text=Once upon a time",
    f"--output={tmp_path / 'out.json'}",
    "--trace",
  )
  assert code == 0, lines
  assert lines[-2] == "no part differs by more than rounding"
  assert lines[-1].startswith("they agree: logits differ by at most ")
  tree = json.loads((tmp_path / "out.json").read_text())
  assert tree["agree"] is True
  assert tree["architecture"] == "LlamaForCausalLM"
  assert tree["trace"]["first_parted"] is None
  assert [text["num_tokens"] for text in tree["texts"]] == [15, 16]


def test_disagreement_is_exit_code_1_and_is_named(models_of_bytes):
  code, lines = _run(
    f"--model={models_of_bytes / 'model'}",
    f"--reference={models_of_bytes / 'changed'}",
    "--text=The river rose.",
    "--continue_tokens=0",
    "--trace",
  )
  assert code == 1
  assert "they part in: layer 1 feed-forward" in lines
  assert lines[-1].startswith("they disagree: logits differ by at most ")
