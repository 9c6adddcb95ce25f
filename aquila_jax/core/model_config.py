"""The architecture of a decoder: what a MODEL directory's config.json holds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from aquila_jax.core.config import require

RouterOrder = Literal["topk_then_softmax", "softmax_then_topk", "sigmoid"]
LayerPattern = Literal["all", "every_second", "last_half"]
Dtype = Literal["float32", "bfloat16", "float64"]
AttentionImplementation = Literal["xla", "chunked", "splash", "cudnn"]
ExpertExchange = Literal["ragged_all_to_all", "all_to_all", "all_gather"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling:
  """Every rotary frequency divided by `factor`: position interpolation.

  Chen et al., arXiv 2306.15595.
  """

  kind: Literal["linear"] = "linear"
  factor: float

  def __post_init__(self):
    require(self.factor > 0, f"factor={self.factor}: need > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
  """Low rotary frequencies divided by `factor`, high ones kept (Llama 3.1).

  With w the wavelength of a frequency and C the original context length: kept
  where w < C / high_freq_factor, divided where w > C / low_freq_factor, and
  between the two a mixture that is linear in C / w.
  """

  kind: Literal["llama3"] = "llama3"
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_context_length: int = 8192  # tokens

  def __post_init__(self):
    require(self.factor > 0, f"factor={self.factor}: need > 0")
    require(
      0 < self.low_freq_factor < self.high_freq_factor,
      f"low_freq_factor={self.low_freq_factor}: need > 0 and below"
      f" high_freq_factor={self.high_freq_factor}",
    )
    require(
      self.original_context_length >= 1,
      f"original_context_length={self.original_context_length}: need >= 1",
    )


RopeScaling = LinearRopeScaling | Llama3RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """A mixture of experts in place of the dense FFNs of all or some layers.

  docs/routing.md has the formulas.

  With `topk_then_softmax` (Mixtral) the A gates sum to one. With
  `softmax_then_topk` and `sigmoid` they sum to one only under `renormalise`;
  sparse upcycling is exact only when they do (efficientscale notes, Scale-Out).
  """

  num_experts: int = 8
  top_k: int = 2
  # Those with experts: all, 1, 3, 5, ... (as in GShard and Switch), L // 2 to
  # L - 1, or a list in rising order. The others keep a dense FFN.
  layers: LayerPattern | tuple[int, ...] = "all"
  # Hidden width of those FFNs; None is that of an expert, mlp_dim.
  dense_mlp_dim: int | None = None
  # What a gate is made of, and what experts are ranked by.
  router_order: RouterOrder = "topk_then_softmax"
  # Divide the chosen gates by their sum; a no-op for topk_then_softmax.
  renormalise: bool = True
  # Multiplies every gate, after that.
  gate_scale: float = 1.0
  router_init_std: float = 0.02
  # Tokens choose top_k experts, or experts choose so many tokens that top_k is
  # the mean number of experts a token meets. The latter is not causal.
  choice: Literal["token", "expert"] = "token"
  # A bias an expert that is added when tokens choose, not to the gates, and
  # that training moves against the load (loss.bias_rate).
  selection_bias: bool = False
  # A token's logits less their mean, over their deviation, times this; None
  # leaves them as they are.
  logit_normalisation: float | None = None
  # Experts stand in so many groups of neighbours, and those of a token come
  # from the `top_groups` best of them. Equal numbers are no limit.
  num_groups: int = 1
  top_groups: int = 1
  group_score: Literal["max", "top2_sum"] = "max"
  # In training only: the router's input times U(1 - e, 1 + e), and Gaussian
  # noise of this deviation on its logits.
  input_jitter: float = 0.0
  logit_noise: float = 0.0
  # None is dropless; otherwise slots an expert = factor * A * M / E, and what
  # does not fit is dropped, counted and reported.
  capacity_factor: float | None = None
  # Choose tokens' experts by the platform's kernel, where it has one; the same
  # by the compiler's own operations otherwise (kernels/topk_routing).
  use_routing_kernel: bool = True
  # Rows a block of the dropless dispatch; a group of rows that belongs to one
  # expert is padded to a multiple of it.
  block_size: int = 64
  # Where devices hold different experts (mesh.expert): how rows reach them;
  # None is what sends the fewest bytes (layers/moe/expert_parallel.py).
  exchange: ExpertExchange | None = None
  # Its buffers, as multiples of what a device gets where experts are met
  # evenly. What does not fit takes an exact way that is slower.
  buffer_factor: float = 1.5
  # Hidden width of one more expert that every token meets; 0 is none.
  shared_expert_dim: int = 0
  # Multiply its output by sigmoid(x w), as Qwen2-MoE does.
  shared_expert_gate: bool = True

  def __post_init__(self):
    require(
      self.shared_expert_dim >= 0,
      f"shared_expert_dim={self.shared_expert_dim}: need >= 0; 0 is none",
    )
    require(self.num_experts >= 2, f"num_experts={self.num_experts}: need >= 2")
    require(
      self.dense_mlp_dim is None or self.dense_mlp_dim >= 1,
      f"dense_mlp_dim={self.dense_mlp_dim}: need >= 1, or None for mlp_dim",
    )
    require(
      1 <= self.top_k <= self.num_experts,
      f"top_k={self.top_k}: need 1 <= top_k <= num_experts={self.num_experts}",
    )
    require(self.gate_scale > 0, f"gate_scale={self.gate_scale}: need > 0")
    require(
      self.capacity_factor is None or self.capacity_factor > 0,
      f"capacity_factor={self.capacity_factor}: need > 0, or None for dropless",
    )
    require(self.block_size >= 1, f"block_size={self.block_size}: need >= 1")
    require(
      self.buffer_factor >= 1, f"buffer_factor={self.buffer_factor}: need >= 1"
    )
    self._check_logits()
    self._check_groups()
    if not self.is_causal:
      self._check_expert_choice()

  def _check_logits(self) -> None:
    scale = self.logit_normalisation
    require(
      scale is None or scale > 0,
      f"logit_normalisation={scale}: need > 0, or None",
    )
    if not isinstance(self.layers, str):
      require(
        len(self.layers) > 0
        and self.layers[0] >= 0
        and list(self.layers) == sorted(set(self.layers)),
        f"layers={self.layers}: need layers from 0 in rising order, each once,"
        " at least one",
      )
    require(
      0 <= self.input_jitter < 1,
      f"input_jitter={self.input_jitter}: need 0 <= input_jitter < 1",
    )
    require(self.logit_noise >= 0, f"logit_noise={self.logit_noise}: need >= 0")
    std = self.router_init_std
    require(std >= 0, f"router_init_std={std}: need >= 0")
    require(
      std > 0 or self.logit_noise > 0,
      f"router_init_std={std}: need > 0 or logit_noise > 0; a router of zeros"
      " has equal logits, under input_jitter too, and ties send every token to"
      " the first experts",
    )
    require(
      std > 0 or scale is None,
      f"router_init_std={std}: need > 0 with logit_normalisation={scale};"
      " equal logits have no deviation to divide by",
    )

  def _check_groups(self) -> None:
    require(
      self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
      f"num_groups={self.num_groups}: need a divisor of num_experts="
      f"{self.num_experts}",
    )
    require(
      1 <= self.top_groups <= self.num_groups,
      f"top_groups={self.top_groups}: need 1 <= top_groups <= num_groups="
      f"{self.num_groups}",
    )
    size = self.num_experts // self.num_groups
    require(
      self.top_groups * size >= self.top_k,
      f"top_groups={self.top_groups}: so many groups have"
      f" {self.top_groups * size} experts; need at least top_k={self.top_k}",
    )
    require(
      self.group_score == "max" or size >= 2,
      f"group_score={self.group_score!r}: need two experts a group;"
      f" num_groups={self.num_groups} leaves {size}",
    )

  def _check_expert_choice(self) -> None:
    require(
      self.router_order != "topk_then_softmax",
      f"router_order={self.router_order!r}: need softmax_then_topk or sigmoid"
      " with choice='expert'; an expert ranks tokens by scores",
    )
    for name, needed, why in (
      ("renormalise", False, "the gates are the scores"),
      ("selection_bias", False, "all experts have the same load"),
      ("top_groups", self.num_groups, "tokens choose no groups"),
      ("capacity_factor", None, "top_k says how many tokens an expert takes"),
    ):
      given = getattr(self, name)
      require(
        given == needed,
        f"{name}={given!r}: need {needed!r} with choice='expert'; {why}",
      )

  @property
  def is_causal(self) -> bool:
    """Whether a token's output is the same whatever comes after it."""
    return self.choice == "token"

  @property
  def is_noisy(self) -> bool:
    """Whether training draws random numbers for the routers."""
    return self.input_jitter > 0 or self.logit_noise > 0

  def layers_of(self, num_layers: int) -> tuple[int, ...]:
    """The layers with experts of a model of `num_layers`, in rising order."""
    if not isinstance(self.layers, str):
      return self.layers
    first, step = {
      "all": (0, 1),
      "every_second": (1, 2),
      "last_half": (num_layers // 2, 1),
    }[self.layers]
    return tuple(range(first, num_layers, step))

  @property
  def gates_sum_to_one(self) -> bool:
    summed = self.renormalise or self.router_order == "topk_then_softmax"
    return summed and self.gate_scale == 1 and self.is_causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthMask:
  """Which parts of a model a growth has added, and how much they count.

  Masked Structural Growth (Yao et al., arXiv 2305.02869): at `value` 0 the
  model computes what it computed before it grew, whatever the new parameters
  are; at 1 the mask changes nothing. models/growth_mask.py says how.
  """

  value: float = 0.0
  # The sizes before the growth: indices from there on are new.
  embed_dim: int
  mlp_dim: int
  num_kv_heads: int
  queries_per_kv: int
  new_layers: tuple[int, ...] = ()  # in rising order

  def __post_init__(self):
    require(0 <= self.value <= 1, f"value={self.value}: need 0 <= value <= 1")
    for name in MASKED_SIZES:
      require(
        getattr(self, name) >= 1, f"{name}={getattr(self, name)}: need >= 1"
      )
    require(
      list(self.new_layers) == sorted(set(self.new_layers)),
      f"new_layers={self.new_layers}: need rising order, each once",
    )


# The fields of a GrowthMask that a model has under the same name.
MASKED_SIZES = ("embed_dim", "mlp_dim", "num_kv_heads", "queries_per_kv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

  vocab_size: int
  num_layers: int
  embed_dim: int  # D
  # F; of each expert, in a mixture (moe.dense_mlp_dim is of its other layers).
  mlp_dim: int
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  context_length: int = 2048  # tokens; longest sequence the model is meant for
  rope_theta: float = 1e6
  rope_scaling: RopeScaling | None = None
  # Keys a query sees, its own among them; None is all.
  sliding_window: int | None = None
  norm_epsilon: float = 1e-5
  qkv_bias: bool = True
  out_bias: bool = False  # of the attention's output
  # RMSNorm of every query and key head before RoPE, as in Qwen3.
  qk_norm: bool = False
  # Of these; None is norm_epsilon. Growth by zero-padding scales the other.
  qk_norm_epsilon: float | None = None
  tied_embeddings: bool = False
  init_std: float = 0.02
  moe: MoeConfig | None = None
  # Of a model that was grown and whose new parts do not count in full yet.
  growth_mask: GrowthMask | None = None
  # What the backward pass recomputes: nothing, all but matmuls, everything.
  remat: Literal["none", "dots", "full"] = "none"
  # In so many parts of a row the LM head computes logits where only targets are
  # asked for, of a loss. Of more than one they are computed again backward, and
  # those of all tokens are never there together.
  head_chunks: int = 1
  # What computes attention without a cache (kernels/attention/api.py); None
  # chooses by platform. One that is named is refused where it cannot.
  attention_implementation: AttentionImplementation | None = None
  # Whether layers are a loop, compiled in the time of one. Unrolled, nothing is
  # stacked for the backward pass (benchmarks/train_step_cpu.py). Parameters lie
  # the same.
  scan_layers: bool = True
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
      "head_chunks",
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
    require(
      self.sliding_window is None or self.sliding_window >= 1,
      f"sliding_window={self.sliding_window}: need >= 1, or None for all",
    )
    for name in ("rope_theta", "norm_epsilon", "init_std"):
      require(
        getattr(self, name) > 0, f"{name}={getattr(self, name)}: need > 0"
      )
    require(
      self.qk_norm_epsilon is None or self.qk_norm_epsilon > 0,
      f"qk_norm_epsilon={self.qk_norm_epsilon}: need > 0, or None",
    )
    require(
      self.qk_norm_epsilon is None or self.qk_norm,
      f"qk_norm_epsilon={self.qk_norm_epsilon}: expected None without qk_norm",
    )
    if self.moe is not None:
      self._check_moe_layers(self.moe)
    if self.growth_mask is not None:
      self._check_mask(self.growth_mask)

  def _check_moe_layers(self, moe: MoeConfig) -> None:
    require(
      len(self.moe_layers) > 0,
      f"moe.layers={moe.layers!r}: num_layers={self.num_layers} has none of"
      " these layers",
    )
    require(
      self.moe_layers[-1] < self.num_layers,
      f"moe.layers={moe.layers}: need layers below"
      f" num_layers={self.num_layers}",
    )
    require(
      moe.dense_mlp_dim is None or self.is_mixed,
      f"moe.dense_mlp_dim={moe.dense_mlp_dim}: expected None with moe.layers="
      f"{moe.layers!r}, which leaves no layer a dense FFN",
    )

  def _check_mask(self, mask: GrowthMask) -> None:
    for name in MASKED_SIZES:
      old, size = getattr(mask, name), getattr(self, name)
      require(
        old <= size,
        f"growth_mask.{name}={old}: need <= {size}, the model's own",
      )
    require(
      all(0 <= layer < self.num_layers for layer in mask.new_layers),
      f"growth_mask.new_layers={mask.new_layers}: need layers below"
      f" num_layers={self.num_layers}",
    )
    require(
      self.dense_mlp_dim == self.mlp_dim,
      f"moe.dense_mlp_dim={self.dense_mlp_dim}: expected mlp_dim={self.mlp_dim}"
      " under a growth_mask, which is the same for FFNs and experts",
    )
    # Else no router's loss would weigh anything (models/growth_mask.py).
    require(
      not self.is_mixed or not set(self.moe_layers) <= set(mask.new_layers),
      f"growth_mask.new_layers={mask.new_layers}: need an old layer among those"
      f" with experts, {self.moe_layers}",
    )

  @property
  def moe_layers(self) -> tuple[int, ...]:
    """The layers with experts, in rising order; none of a dense model."""
    return () if self.moe is None else self.moe.layers_of(self.num_layers)

  @property
  def is_mixed(self) -> bool:
    """Whether some layers have experts and others a dense FFN."""
    return 0 < len(self.moe_layers) < self.num_layers

  @property
  def dense_mlp_dim(self) -> int:
    """F of an FFN in place of which a layer has no experts."""
    if self.moe is None or self.moe.dense_mlp_dim is None:
      return self.mlp_dim
    return self.moe.dense_mlp_dim

  def spelled_out(self) -> ModelConfig:
    """The same for every spelling of an architecture's layers with experts.

    `moe.layers` is a list, and the width of the other layers is said.
    """
    if self.moe is None:
      return self
    dense_mlp_dim = self.dense_mlp_dim if self.is_mixed else None
    moe = dataclasses.replace(
      self.moe, layers=self.moe_layers, dense_mlp_dim=dense_mlp_dim
    )
    return dataclasses.replace(self, moe=moe)

  @property
  def head_norm_epsilon(self) -> float:
    """Of the norms of queries and keys."""
    if self.qk_norm_epsilon is None:
      return self.norm_epsilon
    return self.qk_norm_epsilon

  @property
  def queries_per_kv(self) -> int:
    """G, the query heads that share one key/value head."""
    return self.num_heads // self.num_kv_heads


# How a model is drawn, computed and trained: not its leaves, not its function.
_WAYS = (
  "context_length",
  "init_std",
  "remat",
  "head_chunks",
  "attention_implementation",
  "scan_layers",
  "param_dtype",
  "compute_dtype",
)
_MOE_WAYS = (
  "router_init_std",
  "input_jitter",
  "logit_noise",
  "capacity_factor",
  "use_routing_kernel",
  "block_size",
  "exchange",
  "buffer_factor",
)


Difference = tuple[str, Any, Any]


def differences(one: ModelConfig, other: ModelConfig) -> list[Difference]:
  """In what two are not one architecture: fields and the values of both.

  How a model is drawn, computed and trained is not a part of it. A field of
  mixtures is `moe.top_k` and the like, where both are mixtures.
  """
  found = _differences(one, other, apart_from=(*_WAYS, "moe"))
  if one.moe is not None and other.moe is not None:
    moe = _differences(one.moe, other.moe, apart_from=_MOE_WAYS)
    found += [(f"moe.{name}", *values) for name, *values in moe]
  elif one.moe != other.moe:
    found.append(("moe", one.moe, other.moe))
  return found


def _differences(
  one: Any, other: Any, *, apart_from: tuple[str, ...]
) -> list[Difference]:
  names = (field.name for field in dataclasses.fields(one))
  pairs = ((name, getattr(one, name), getattr(other, name)) for name in names)
  return [
    (name, a, b) for name, a, b in pairs if name not in apart_from and a != b
  ]
