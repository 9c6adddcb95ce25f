"""Tiny mixtures, batches of invented tokens, and counts made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.types import Batch, RoutingStats
from aquila_jax.data import rows
from aquila_jax.evaluation.routing.counts import RoutingCounts

MOE = MoeConfig(num_experts=4, top_k=2, block_size=4, capacity_factor=1.0)
CONFIG = ModelConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  mlp_dim=6,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  context_length=8,
  compute_dtype="float32",
  init_std=1.0,
  moe=dataclasses.replace(MOE, router_init_std=1.0),
)


def with_moe(num_layers: int = 2, **fields) -> ModelConfig:
  """CONFIG with other fields of its mixture."""
  moe = CONFIG.moe
  assert moe is not None
  return dataclasses.replace(
    CONFIG, num_layers=num_layers, moe=dataclasses.replace(moe, **fields)
  )


def batches() -> list[Batch]:
  """Two of two rows: documents that end in a row, two domains, padding."""
  generator = np.random.default_rng(0)

  def row(*lengths: int, domain: int) -> Batch:
    pieces = [generator.integers(0, 11, length) for length in lengths]
    return rows.pack(pieces, language=domain, length=7)

  return [
    rows.stack([row(3, 5, domain=0), row(8, domain=1)]),
    rows.stack([row(4, domain=1), row(domain=1)]),
  ]


def counted(
  tokens: Sequence[int],
  experts: Sequence[Sequence[int]],
  *,
  domains: Sequence[int] | None = None,
  num_experts: int = 3,
  layers: Sequence[int] = (1,),
  entropy: float = 0.5,
) -> RoutingCounts:
  """Counts of one row of text that goes to the same experts in all layers."""
  domains = [0] * len(tokens) if domains is None else domains
  counts = RoutingCounts(
    layers,
    num_experts=num_experts,
    num_domains=max(domains) + 1,
    vocab_size=max(tokens) + 1,
  )
  row = np.asarray([tokens], np.int32)
  fields: dict[str, Any] = dict(
    tokens=row,
    targets=row,
    weights=np.ones(row.shape, np.float32),
    segments=np.ones_like(row),
    positions=np.arange(row.size, dtype=np.int32)[None],
    languages=np.asarray([domains], np.int32),
  )
  ids = np.broadcast_to(
    np.asarray([experts], np.int32)[None],
    (len(layers), 1, len(tokens), len(experts[0])),
  )
  counts.add(Batch(**fields), ids, stats(len(layers), num_experts, entropy))
  return counts


def stats(size: int, num_experts: int, entropy: float) -> RoutingStats:
  """Of `size` layers; the largest gate 0.75, z 2, nothing dropped."""
  fields: dict[str, Any] = dict(
    load=np.full((size, num_experts), 1 / num_experts, np.float32),
    probability=np.full((size, num_experts), 1 / num_experts, np.float32),
    sequence_balance=np.ones(size, np.float32),
    z_loss=np.full(size, 2.0, np.float32),
    entropy=np.full(size, entropy, np.float32),
    top_gate=np.full(size, 0.75, np.float32),
    dropped=np.zeros(size, np.float32),
  )
  return RoutingStats(**fields)
