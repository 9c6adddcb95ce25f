"""Every upcycling against its dense parent, both through stock transformers."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.growth.routers import Sample
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from aquila_jax.interop.stock_model import StockModel
from tests.parity import checking
from tests.parity.exported_parity import (
  _LATE,
  _NO_BIAS,
  _QK_NORM,
  DENSE,
  random_model,
  saved,
  with_moe,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A dense parent, and what it becomes."""

  architecture: str
  words: str
  source: ModelConfig
  target: ModelConfig
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _with(config: ModelConfig, *, mlp_dim: int = 40, **moe) -> ModelConfig:
  return dataclasses.replace(with_moe(config, **moe), mlp_dim=mlp_dim)


# 40 hidden units in 2 shards, 3 copies of each; a token meets two copies.
_GRANULAR: dict[str, Any] = dict(mlp_dim=20, top_k=4)
_EXACT = [
  Case("MixtralForCausalLM", "copies", _NO_BIAS, _with(_NO_BIAS)),
  Case(
    "MixtralForCausalLM",
    "copies, top 1, noisy router",
    _NO_BIAS,
    _with(_NO_BIAS, top_k=1, router_init_std=2.0),
  ),
  Case(
    "MixtralForCausalLM",
    "copies, softmax then top-k, renormalised",
    _NO_BIAS,
    _with(_NO_BIAS, **_LATE),
  ),
  Case(
    "MixtralForCausalLM",
    "2 shards of 3 copies",
    _NO_BIAS,
    _with(_NO_BIAS, **_GRANULAR),
    dict(method="granular"),
  ),
  Case(
    "MixtralForCausalLM",
    "copies, a router from clusters",
    _NO_BIAS,
    _with(_NO_BIAS),
    dict(router="clusters"),
  ),
  Case("Qwen2MoeForCausalLM", "QKV bias, copies", DENSE, _with(DENSE)),
  Case(
    "Qwen2MoeForCausalLM",
    "QKV bias, 2 shards of 3 copies",
    DENSE,
    _with(DENSE, **_GRANULAR),
    dict(method="granular"),
  ),
  Case(
    "Qwen2MoeForCausalLM",
    "a shared half behind a gate, copies of the other",
    _NO_BIAS,
    _with(_NO_BIAS, mlp_dim=20, shared_expert_dim=20),
  ),
  Case(
    "Qwen2MoeForCausalLM",
    "experts in every second layer",
    _NO_BIAS,
    _with(_NO_BIAS, layers="every_second"),
  ),
  Case(
    "Qwen2MoeForCausalLM",
    "2 shards of 3 copies in every second layer, FFNs as they were",
    _NO_BIAS,
    _with(_NO_BIAS, **_GRANULAR, layers="every_second", dense_mlp_dim=40),
    dict(method="granular"),
  ),
  Case("Qwen3MoeForCausalLM", "qk_norm, copies", _QK_NORM, _with(_QK_NORM)),
  Case(
    "Qwen3MoeForCausalLM",
    "qk_norm, 2 shards of 3 copies, softmax then top-k, renormalised",
    _QK_NORM,
    _with(_QK_NORM, **_GRANULAR, **_LATE),
    dict(method="granular"),
  ),
]
_CHANGED = [
  Case(
    "MixtralForCausalLM",
    "Drop-Upcycling",
    _NO_BIAS,
    _with(_NO_BIAS),
    dict(method="drop_upcycling"),
  ),
  Case(
    "Qwen3MoeForCausalLM",
    "qk_norm, noise",
    _QK_NORM,
    _with(_QK_NORM),
    dict(method="noise"),
  ),
  Case(
    "Qwen2MoeForCausalLM",
    "gates that do not sum to one, with a constant",
    _NO_BIAS,
    _with(_NO_BIAS, **_LATE, renormalise=False),
  ),
]


def _ids(cases: list[Case]) -> list[str]:
  return [f"{case.architecture}-{case.words}" for case in cases]


def _sample() -> Sample:
  tokens = np.asarray([row[:64] for row in checking.BYTES], np.int32)
  places = np.arange(tokens.shape[1], dtype=np.int32)
  return Sample(
    tokens=tokens,
    positions=np.broadcast_to(places, tokens.shape),
    segments=np.ones_like(tokens),
    domains=np.zeros_like(tokens),
    names=("text",),
  )


def _grown(
  case: Case, path: pathlib.Path
) -> tuple[StoredModel, StoredModel, StockModel, StockModel]:
  """Parent and child, ours and stock."""
  parent = saved(random_model(case.source), path / "parent")
  options = ScaleOut(source="parent", **case.options)
  grown = scale_out(
    parent, case.target, options, sample=_sample(), others=(), seed=3
  )
  child = saved(grown, path / "child")
  for name in ("parent", "child"):
    checking.exported(path / name, path / f"{name}_hf")
  stock = StockModel(str(path / "child_hf"))
  assert stock.architecture == case.architecture
  return parent, child, StockModel(str(path / "parent_hf")), stock


def _largest_difference(one: StockModel, other: StockModel) -> float:
  return max(
    float(np.abs(one.logits(row) - other.logits(row)).max())
    for row in checking.BYTES
  )


@pytest.mark.parametrize("case", _EXACT, ids=_ids(_EXACT))
def test_the_function_is_its_parents(case, tmp_path, records):
  plan = plan_scale_out(
    case.source, case.target, ScaleOut(source="parent", **case.options)
  )
  assert plan.exactness.exact
  parent, _, stock_parent, stock = _grown(case, tmp_path)
  assert _largest_difference(stock_parent, stock) <= checking.TOLERANCE
  # The parent as we compute it, and what it became as transformers does.
  found = checking.compare(parent, stock)
  checking.record(
    records, found, section="upcycled", options=case.words, reference=stock
  )
  assert found.failures == []


@pytest.mark.parametrize("case", _CHANGED, ids=_ids(_CHANGED))
def test_a_changed_function_is_changed_alike(case, tmp_path, records):
  _, child, stock_parent, stock = _grown(case, tmp_path)
  assert _largest_difference(stock_parent, stock) > 100 * checking.TOLERANCE
  found = checking.compare(child, stock)
  checking.record(
    records, found, section="upcycled", options=case.words, reference=stock
  )
  assert found.failures == []
