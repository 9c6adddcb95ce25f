"""Parameters and FLOPs of a model, from the axes its leaves declare.

Nothing is allocated and no path is read: a leaf is an expert's, the router's or
the LM head's because of what it reads and writes.

FLOPs are those of matrix products, a multiply and an add each, for one token in
a full row of T tokens (PaLM, arXiv 2204.02311, appendix B):

  forward = 2 * (elements of every matrix that a token meets)
            + 4 * L * N * H * T        (q k^T and its product with v)
  training = 3 * forward               (the backward pass is two forwards)
             + forward - LM head       (the load of a global balance loss under
                                        accumulation, training/accumulation.py)

A token meets A of E experts. The embedding is looked up, not multiplied; a tied
table counts once, as the head. Attention is counted over all T keys although
causality makes half of them idle, as PaLM does. Not counted: norms, softmax and
other work that is linear in the width, what remat computes again, and the
padding of the dropless dispatch.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.models import decoder_lm

# In the order of the table.
PARTS = (
  "embedding",
  "attention",
  "attention scores",
  "ffn",
  "experts",
  "shared expert",
  "router",
  "norms",
  "lm_head",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCount:
  """What one part of the model holds and does."""

  parameters: int = 0
  active: int = 0  # parameters that one token meets
  forward_flops: int = 0  # a token

  def __add__(self, other: PartCount) -> PartCount:
    return PartCount(
      parameters=self.parameters + other.parameters,
      active=self.active + other.active,
      forward_flops=self.forward_flops + other.forward_flops,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCount:
  """The parts of a model, those it has, in the order of PARTS."""

  parts: dict[str, PartCount]
  sequence_length: int  # T of the FLOPs

  @property
  def total(self) -> PartCount:
    return sum(self.parts.values(), PartCount())

  @property
  def train_flops(self) -> int:
    """FLOPs a token of a training step, forward and backward."""
    return 3 * self.total.forward_flops


def count(
  config: ModelConfig, *, sequence_length: int | None = None
) -> ModelCount:
  """Counts a model of any size without allocating it.

  Args:
    config: the architecture.
    sequence_length: T of the attention; None is the model's context length.

  Returns:
    Parameters in all and active, and forward FLOPs a token, by part.
  """
  if sequence_length is None:
    sequence_length = config.context_length
  parts: dict[str, PartCount] = dict.fromkeys(PARTS, PartCount())
  shapes = jax.tree.leaves(decoder_lm.abstract_params(config))
  declared = jax.tree.leaves(decoder_lm.parameter_axes(config))
  for leaf, axes in zip(shapes, declared, strict=True):
    part = _part(axes)
    parts[part] += _count_leaf(axes, leaf.shape, config=config)
    if part == "embedding" and config.tied_embeddings:
      flops = 2 * math.prod(leaf.shape)
      parts["lm_head"] += PartCount(forward_flops=flops)
  width = config.num_heads * config.head_dim
  parts["attention scores"] += PartCount(
    forward_flops=4 * config.num_layers * width * sequence_length
  )
  present = {name: n for name, n in parts.items() if n != PartCount()}
  return ModelCount(parts=present, sequence_length=sequence_length)


def train_flops_per_token(
  config: ModelConfig, sequence_length: int, *, has_load_pass: bool = False
) -> float:
  """Forward and backward FLOPs of one token in rows of `sequence_length`.

  Args:
    config: the architecture.
    sequence_length: T.
    has_load_pass: of `TrainConfig.has_load_pass`; one forward pass more, which
      stops before the LM head.

  Returns:
    FLOPs of a training step over its tokens.
  """
  counted = count(config, sequence_length=sequence_length)
  flops = counted.train_flops
  if has_load_pass:
    head = counted.parts["lm_head"].forward_flops
    flops += counted.total.forward_flops - head
  return float(flops)


def format_count(counted: ModelCount) -> str:
  """The table that the `count` verb prints."""
  rows = [("part", "parameters", "active", "forward FLOPs/token")]
  for name, part in {**counted.parts, "total": counted.total}.items():
    rows.append(
      (
        name,
        f"{part.parameters:,}",
        f"{part.active:,}",
        f"{part.forward_flops:,}",
      )
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [_row(row, widths) for row in rows]
  rule = "-" * len(lines[0])
  total = counted.total
  return "\n".join(
    [
      lines[0],
      rule,
      *lines[1:-1],
      rule,
      lines[-1],
      "",
      f"{in_words(total.parameters)} parameters,"
      f" {in_words(total.active)} active;"
      f" {in_words(counted.train_flops)} training FLOPs a token"
      f" (forward and backward, T={counted.sequence_length})",
    ]
  )


def in_words(number: int | float) -> str:
  """`number` to one decimal with K, M, B or T: 104_693_000_000 is 104.7B."""
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    # What rounds up to the next unit is shown in it: 999,960 is 1.0M.
    if number >= size * 0.99995:
      return f"{number / size:.1f}{unit}"
  return str(number)


def _part(axes: LeafAxes) -> str:
  """The part that a leaf belongs to, by what it reads and writes."""
  if axes.has("vocab"):
    is_table = axes.has("vocab", Role.NEITHER)
    return "embedding" if is_table else "lm_head"
  if axes.has("shared_mlp") or axes.has("shared_expert"):
    return "shared expert"
  if axes.has("expert"):
    return "router" if axes.has("expert", Role.WRITES) else "experts"
  if axes.has("kv_head"):
    return "attention"
  is_ffn = axes.has("mlp") or axes.has("dense_mlp")
  return "ffn" if is_ffn else "norms"


def _count_leaf(
  axes: LeafAxes, shape: tuple[int, ...], *, config: ModelConfig
) -> PartCount:
  parameters = active = math.prod(shape)
  if axes.has("expert", Role.NEITHER):
    assert config.moe is not None
    active = parameters // config.moe.num_experts * config.moe.top_k
  return PartCount(
    parameters=parameters,
    active=active,
    forward_flops=2 * active if axes.is_map else 0,
  )


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
  name, *numbers = (
    cell.ljust(width) if i == 0 else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
  )
  return "  ".join((name, *numbers))
