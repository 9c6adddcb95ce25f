"""SmolLM2-135M: a model that people use, through its GGUF file in both."""

from __future__ import annotations

import pathlib

import pytest
from tokenizers import Tokenizer

from aquila_jax.interop import comparison, registry, tracing
from aquila_jax.interop.stock_model import StockModel
from tests.parity import checking

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _rows(tokenizer: Tokenizer) -> list[list[int]]:
  """The standing texts, and longer ones of the repository."""
  english = (_ROOT / "experiments/data/smoke/en.txt").read_text("utf-8")
  chinese = (_ROOT / "experiments/data/smoke/zh.txt").read_text("utf-8")
  long = [english[:1200], english[2400:3600], chinese[:300]]
  return [tokenizer.encode(text).ids[:200] for text in comparison.TEXTS] + [
    tokenizer.encode(text).ids[:200] for text in long
  ]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """The MODEL, and the same file in transformers."""
  path = tmp_path_factory.mktemp("smollm2")
  model = registry.lookup("smollm2_135m", what="model")
  with registry.fetched(model, progress=print) as file:
    ours = checking.imported(file, path / "model")
    yield ours, StockModel(str(file)), path


def test_the_gguf_is_the_same_model_in_both(pretrained, records):
  ours, reference, _ = pretrained
  assert ours.tokenizer is not None
  rows = _rows(Tokenizer.from_str(ours.tokenizer))
  found = checking.compare(ours, reference, rows)
  checking.record(
    records,
    found,
    section="pretrained",
    options="SmolLM2-135M-Instruct, GGUF",
    reference=reference,
  )
  assert found.failures == []


def test_no_part_differs_by_more_than_rounding(pretrained):
  ours, reference, _ = pretrained
  assert ours.tokenizer is not None
  config, params = comparison.in_float32(ours)
  for row in _rows(Tokenizer.from_str(ours.tokenizer))[:2]:
    parts = tracing.compare_traces(
      config, params, row, reference=reference.trace(row)
    )
    assert tracing.first_parted(parts) is None


def test_the_export_is_the_same_bit_by_bit(pretrained):
  ours, _, path = pretrained
  export = checking.exported(path / "model", path / "export")
  assert export.architecture == "LlamaForCausalLM"
  checking.assert_same_model(
    checking.imported(path / "export", path / "again"), ours
  )
