"""What a growth does to the function, derived from its maps and the norms.

A rule, not a list of methods: it asks of every map what the proof in
axis_map.py asks of it, so it holds for maps that a user gives as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from aquila_jax.core.axes import Role
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth.growth import Growth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exactness:
  """Whether the grown model computes what its source did."""

  # Logits of the source's tokens are the same, but for rounding.
  exact: bool
  reasons: tuple[str, ...]  # why not; none where it is exact
  notes: tuple[str, ...] = ()  # what else changes

  def to_json(self) -> dict[str, Any]:
    """For the lineage."""
    return {
      "exact": self.exact,
      "reasons": list(self.reasons),
      "notes": list(self.notes),
    }

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> Exactness:
    """Of `to_json`; other fields may stand beside them."""
    return cls(
      exact=fields["exact"],
      reasons=tuple(fields["reasons"]),
      notes=tuple(fields["notes"]),
    )

  def in_words(self) -> str:
    words = (
      "exact: the function of the source is kept, but for rounding"
      if self.exact
      else "not exact: " + "; ".join(self.reasons)
    )
    return "; ".join([words, *self.notes])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """Source and target on the same tokens, computed in at least float32."""

  tokens: int
  largest_difference: float  # of a logit; of the source's tokens
  largest_logit: float  # of the source
  loss_before: float  # nats a token
  loss_after: float

  def in_words(self) -> str:
    return (
      f"measured on {self.tokens} tokens: logits differ by at most"
      f" {self.largest_difference:.2g} (they go up to"
      f" {self.largest_logit:.3g}), loss {self.loss_before:.4f} ->"
      f" {self.loss_after:.4f}"
    )


def predict(
  growth: Growth, source: ModelConfig, target: ModelConfig
) -> Exactness:
  """Whether a growth keeps the function.

  Args:
    growth: the maps.
    source: the architecture that grows.
    target: what it grows into.

  Returns:
    The prediction, with its reasons.
  """
  reasons = [
    *(["its maps are learned on the target's loss"] if growth.learned else []),
    *_width_reasons(growth),
    *_norm_reasons(growth, source, target),
    *_source_reasons(growth),
    *_depth_reasons(growth),
    *_position_reasons(source, target),
  ]
  return Exactness(
    exact=not reasons,
    reasons=tuple(reasons),
    notes=tuple(_notes(growth, source, target)),
  )


def _width_reasons(growth: Growth) -> list[str]:
  reasons = []
  for name, g in growth.width.items():
    if g.unused:
      reasons.append(f"{len(g.unused)} indices of {name} are copied nowhere")
    # A residual is read by rows, so what is written there must be zero; what is
    # computed inside a layer may be anything where it is read by zeros.
    needed = (Role.WRITES,) if name == "embed" else (Role.READS, Role.WRITES)
    if g.has_empty and g.silent not in needed and not growth.masked:
      reasons.append(f"new indices of {name} add what the source has not")
  return reasons


def _norm_reasons(
  growth: Growth, source: ModelConfig, target: ModelConfig
) -> list[str]:
  factor = growth.mean_square_factor
  if factor is None:
    counts = sorted(set(growth.width["embed"].counts.tolist()))
    return [
      "embed is copied unevenly ("
      + " and ".join(f"x{c}" for c in counts)
      + "), and RMSNorm takes the mean of the squares over it"
    ]
  needed = source.norm_epsilon * factor
  if not math.isclose(target.norm_epsilon, needed, rel_tol=1e-6):
    return [
      f"norm_epsilon is {target.norm_epsilon:g} where the norms of this"
      f" residual need {needed:.7g}"
    ]
  of_heads = (source.head_norm_epsilon, target.head_norm_epsilon)
  if source.qk_norm and not math.isclose(*of_heads, rel_tol=1e-6):
    return [
      f"the norms of the heads have the epsilon {of_heads[1]:.7g} and need the"
      f" source's, qk_norm_epsilon={of_heads[0]:g}"
    ]
  return []


def _source_reasons(growth: Growth) -> list[str]:
  if growth.layers.copies.source_size == 1:
    return []  # the only layer stands for the next one
  taking = [
    name
    for name in growth.width
    if name in growth.from_next_layer and growth.width[name].is_new.any()
  ]
  if not taking:
    return []
  return [
    f"new indices of {', '.join(taking)} compute what the next layer does"
  ]


def _depth_reasons(growth: Growth) -> list[str]:
  if growth.keeps_layers:
    return []
  return [
    "layers run more than once or in another order"
    f" ({growth.layers.copies.rule})"
  ]


def _position_reasons(source: ModelConfig, target: ModelConfig) -> list[str]:
  reasons = []
  for field in ("rope_theta", "rope_scaling"):
    before, after = getattr(source, field), getattr(target, field)
    if before != after:
      reasons.append(f"{field} changes, which turns the heads otherwise")
  return reasons


def _notes(
  growth: Growth, source: ModelConfig, target: ModelConfig
) -> list[str]:
  notes = []
  if growth.masked:
    notes.append(
      "what is new counts nothing until training raises the growth mask"
      " (train.mask_steps)"
    )
  if growth.vocab is not None and growth.vocab.is_new.any():
    notes.append(
      f"{int(growth.vocab.is_new.sum())} new tokens take a part of the"
      " probability, so the loss changes though the logits do not"
    )
  if target.param_dtype == "bfloat16" and not _powers_of_two(growth):
    notes.append(
      "shares are rounded to bfloat16, after which logits can differ by"
      " percents (param_dtype='float32' keeps them)"
    )
  if target.head_norm_epsilon != target.norm_epsilon and target.qk_norm:
    notes.append(
      "export_hf will refuse it: stock classes have one epsilon for all norms"
    )
  if source.param_dtype != target.param_dtype:
    notes.append(f"parameters are cast to {target.param_dtype}")
  return notes


def _powers_of_two(growth: Growth) -> bool:
  """Whether every division is by a power of two, which rounds nothing."""
  counts = np.concatenate([g.counts for g in growth.width.values()])
  plain = growth.noise == 0 and growth.mean_square_factor in (1.0, None)
  return plain and bool((counts & (counts - 1) == 0).all())
