"""All that `inspect_routing` finds, and the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.evaluation.routing import measures, typical
from aquila_jax.evaluation.routing.cosines import LayerCosines
from aquila_jax.evaluation.routing.counts import RoutingCounts
from aquila_jax.evaluation.routing.measures import LayerRouting, TokenClass
from aquila_jax.evaluation.routing.token_text import TokenText
from aquila_jax.evaluation.routing.typical import TypicalToken


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a reader may choose."""

  dead: float  # a load below this fraction of an even share is none
  min_count: int  # the least occurrences of a typical token, or of a class
  typical: int  # the most tokens of an expert


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
  """Where a mixture sends the tokens of a text. K domains, L layers."""

  model: str  # the MODEL, as it was given
  text: str  # what was read, in words
  config: ModelConfig
  options: Options
  domain_noun: str  # language or domain
  domains: tuple[str, ...]
  domain_tokens: tuple[int, ...]
  classes: list[TokenClass]
  layers: list[LayerRouting]
  typical: list[list[list[TypicalToken]]]  # [L E], at most options.typical
  token_text: TokenText
  cosines: list[LayerCosines]
  # Where the experts came from, in words; "" where that is not known.
  parent: str

  @property
  def num_tokens(self) -> int:
    return sum(self.domain_tokens)

  @property
  def worst(self) -> LayerRouting:
    """The layer whose busiest expert has the largest load."""
    return max(self.layers, key=lambda layer: layer.max_over_mean)

  @property
  def has_pairs(self) -> bool:
    """Whether a token may meet two experts."""
    moe = self.config.moe
    assert moe is not None
    return moe.top_k > 1 or not moe.is_causal

  def dead(self) -> dict[int, list[int]]:
    """Experts that are hardly met, by layer; layers without are left out."""
    found = {
      layer.layer: layer.dead(self.options.dead) for layer in self.layers
    }
    return {layer: experts for layer, experts in found.items() if experts}

  def dead_in_words(self) -> str:
    """Such as `layer 3: experts 5, 7; layer 4: expert 0`; none is "none"."""
    parts = [
      f"layer {layer}: expert{'s' if len(experts) > 1 else ''}"
      f" {', '.join(map(str, experts))}"
      for layer, experts in self.dead().items()
    ]
    return "; ".join(parts) or "none"

  def distances(self, layer: LayerRouting) -> np.ndarray:
    """Total variation between the loads of domains, [K K]."""
    loads = layer.domain_load
    return np.array([[measures.distance(a, b) for b in loads] for a in loads])

  def to_json(self) -> dict[str, Any]:
    """All numbers."""
    moe = self.config.moe
    assert moe is not None
    return {
      "model": self.model,
      "text": self.text,
      "tokens": self.num_tokens,
      "domains": dict(zip(self.domains, self.domain_tokens, strict=True)),
      "num_layers": self.config.num_layers,
      "num_experts": moe.num_experts,
      "top_k": moe.top_k,
      "router_order": moe.router_order,
      "choice": moe.choice,
      "capacity_factor": moe.capacity_factor,
      "options": dataclasses.asdict(self.options),
      "worst_layer": self.worst.layer,
      "dead": {str(layer): experts for layer, experts in self.dead().items()},
      "classes": [self._class(one) for one in self.classes],
      "parent": self.parent,
      "layers": [self._layer(row) for row in range(len(self.layers))],
    }

  def _layer(self, row: int) -> dict[str, Any]:
    layer = self.layers[row]
    names = [one.name for one in self.classes]
    found = {
      "layer": layer.layer,
      "load": layer.load,
      "load_max_over_mean": layer.max_over_mean,
      "load_entropy": layer.load_entropy,
      "router_entropy": layer.router_entropy,
      "top_gate": layer.top_gate,
      "router_z": layer.router_z,
      "dropped_share": layer.dropped,
      "over_capacity": layer.over_capacity,
      "domain_load": dict(zip(self.domains, layer.domain_load, strict=True)),
      "domain_distance": self.distances(layer),
      "class_load": dict(zip(names, layer.class_load, strict=True)),
      "typical_tokens": [
        [self._typical(token) for token in expert]
        for expert in self.typical[row]
      ],
    }
    if self.has_pairs:
      found["tokens_together"] = layer.together
      found["pair_lift"] = measures.pair_lift(layer.together)
    if self.cosines:
      cosines = self.cosines[row]
      found["cosine_between"] = cosines.between
      found["cosine_to_parent"] = cosines.to_parent
    return _plain(found)

  def _class(self, one: TokenClass) -> dict[str, Any]:
    shown = [self.token_text.shown(token) for token in one.examples]
    return _plain(dataclasses.asdict(one)) | {"examples": shown}

  def _typical(self, token: TypicalToken) -> dict[str, Any]:
    shown = self.token_text.shown(token.token)
    return {"text": shown} | dataclasses.asdict(token)


def _plain(value: Any) -> Any:
  """Arrays as lists; what is no number as None."""
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, float) and not np.isfinite(value):
    return None
  return value


def inspection(
  counts: RoutingCounts,
  *,
  model: str,
  text: str,
  config: ModelConfig,
  options: Options,
  domain_noun: str,
  domains: Sequence[str],
  token_text: TokenText,
  cosines: Sequence[LayerCosines] = (),
  parent: str = "",
) -> Inspection:
  """Puts together what was counted and compared.

  Args:
    counts: of the text.
    model: see `Inspection`, as are all below.
    text: what was read.
    config: of the model.
    options: of the reader.
    domain_noun: what the domains are.
    domains: names, in the order of the counts; those without text are left
      out.
    token_text: what tokens stand for.
    cosines: layer by layer; none were compared where it is empty.
    parent: in words.

  Returns:
    The inspection.
  """
  seen: list[int] = np.flatnonzero(counts.occurrences).tolist()
  class_of = {token: token_text.token_class(token) for token in seen}
  classes = measures.classes_of(counts, class_of)
  read: list[int] = np.flatnonzero(counts.domain_tokens).tolist()
  return Inspection(
    model=model,
    text=text,
    config=config,
    options=options,
    domain_noun=domain_noun,
    domains=tuple(domains[k] for k in read),
    domain_tokens=tuple(counts.domain_tokens[read].tolist()),
    classes=classes,
    layers=measures.layers_of(
      counts, classes=[one.name for one in classes], class_of=class_of
    ),
    typical=[
      typical.typical_tokens(
        counts, row, min_count=options.min_count, limit=options.typical
      )
      for row in range(len(counts.layers))
    ],
    token_text=token_text,
    cosines=list(cosines),
    parent=parent,
  )
