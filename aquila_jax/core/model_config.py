"""The architecture of a decoder: what a MODEL directory's config.json holds."""

from __future__ import annotations

import dataclasses
from typing import Literal

from aquila_jax.core.config import require

RouterOrder = Literal["topk_then_softmax", "softmax_then_topk"]
Dtype = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """A mixture of experts in place of every dense FFN.

  With `topk_then_softmax` (Mixtral) the A gates sum to one. With
  `softmax_then_topk` they sum to one only under `renormalise`; sparse
  upcycling is exact only when they do (efficientscale notes, Scale-Out).
  """

  num_experts: int = 8
  top_k: int = 2
  router_order: RouterOrder = "topk_then_softmax"
  # Divide the chosen gates by their sum; a no-op for topk_then_softmax.
  renormalise: bool = True
  router_init_std: float = 0.02
  # None is dropless; otherwise slots an expert = factor * A * M / E, and what
  # does not fit is dropped, counted and reported.
  capacity_factor: float | None = None
  # Rows a block of the dropless dispatch; a group of rows that belongs to one
  # expert is padded to a multiple of it.
  block_size: int = 64

  def __post_init__(self):
    require(self.num_experts >= 2, f"num_experts={self.num_experts}: need >= 2")
    require(
      1 <= self.top_k <= self.num_experts,
      f"top_k={self.top_k}: need 1 <= top_k <= num_experts={self.num_experts}",
    )
    require(
      self.capacity_factor is None or self.capacity_factor > 0,
      f"capacity_factor={self.capacity_factor}: need > 0, or None for dropless",
    )
    require(self.block_size >= 1, f"block_size={self.block_size}: need >= 1")
    require(
      self.router_init_std > 0,
      f"router_init_std={self.router_init_std}: need > 0, a router of zeros"
      " sends every token to the first experts",
    )

  @property
  def gates_sum_to_one(self) -> bool:
    return self.renormalise or self.router_order == "topk_then_softmax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

  vocab_size: int
  num_layers: int
  embed_dim: int  # D
  mlp_dim: int  # F; of each expert, in a mixture
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  context_length: int = 2048  # tokens; longest sequence the model is meant for
  rope_theta: float = 1e6
  norm_epsilon: float = 1e-5
  qkv_bias: bool = True
  tied_embeddings: bool = False
  init_std: float = 0.02
  moe: MoeConfig | None = None
  # What the backward pass recomputes: nothing, all but matmuls, everything.
  remat: Literal["none", "dots", "full"] = "none"
  param_dtype: Dtype = "float32"
  compute_dtype: Dtype = "bfloat16"

  def __post_init__(self):
    sizes = (
      "vocab_size",
      "num_layers",
      "embed_dim",
      "mlp_dim",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "context_length",
    )
    for name in sizes:
      require(
        getattr(self, name) >= 1, f"{name}={getattr(self, name)}: need >= 1"
      )
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"num_heads={self.num_heads} is not a multiple of"
      f" num_kv_heads={self.num_kv_heads}",
    )
    require(
      self.head_dim % 2 == 0,
      f"head_dim={self.head_dim}: rotary embeddings need an even width",
    )
    for name in ("rope_theta", "norm_epsilon", "init_std"):
      require(
        getattr(self, name) > 0, f"{name}={getattr(self, name)}: need > 0"
      )

  @property
  def queries_per_kv(self) -> int:
    """G, the query heads that share one key/value head."""
    return self.num_heads // self.num_kv_heads
