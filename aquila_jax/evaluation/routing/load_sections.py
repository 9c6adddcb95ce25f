"""Sections of the page on where tokens go: load, languages, classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from aquila_jax.evaluation import formats, page
from aquila_jax.evaluation.markup import Markup, element
from aquila_jax.evaluation.plots import figure
from aquila_jax.evaluation.routing import maps, measures
from aquila_jax.evaluation.routing.inspection import Inspection
from aquila_jax.evaluation.routing.maps import Panel
from aquila_jax.evaluation.routing.measures import LayerRouting
from aquila_jax.evaluation.tables import Table

_FEW_DOMAINS = 3  # up to which every pair is compared


def layer_labels(found: Inspection) -> list[str]:
  """As beside the rows of a map."""
  return [f"layer {layer.layer}" for layer in found.layers]


def chips(found: Inspection, tokens: Sequence[tuple[int, str]]) -> Markup:
  """Tokens in frames, each with a note behind it."""
  return element(
    "span",
    *(
      element(
        "span",
        found.token_text.shown(token),
        element("small", note) if note else "",
        class_="token",
      )
      for token, note in tokens
    ),
    class_="chips",
  )


def load(found: Inspection) -> Markup:
  """The map of all layers and their table."""
  chart = maps.grid_map(
    Panel(
      title="Load by layer and expert",
      values=np.stack([layer.relative_load for layer in found.layers]),
    ),
    rows=layer_labels(found),
    scale=maps.EVEN_SHARE,
    corner="expert",
  )
  return page.section(
    "load",
    "Load of the experts",
    element(
      "p",
      "A router sends every token to a few of the experts of a layer, and an"
      " expert's load is its share of all these assignments: 1 is an even"
      " share, and an expert near 0 is hardly used.",
    ),
    figure(
      chart,
      "The load of each expert in multiples of an even share: blue below, grey"
      " at and orange above it.",
    ),
    _load_table(found).html(),
    element("p", _columns_in_words(found), class_="note"),
  )


def _load_table(found: Inspection) -> Table:
  def row(layer: LayerRouting) -> tuple[str, ...]:
    cells = (
      str(layer.layer),
      formats.times(layer.max_over_mean),
      str(int(layer.load.argmax())),
      f"{layer.load_entropy:.3f}",
      f"{layer.router_entropy:.3f}",
      f"{layer.top_gate:.3f}",
      f"{layer.router_z:.3f}",
      formats.percent(layer.dropped),
    )
    if layer.over_capacity is None:
      return cells
    return (*cells, formats.percent(layer.over_capacity))

  columns = (
    "layer",
    "max / mean load",
    "busiest expert",
    "load entropy, nats",
    "router entropy, nats",
    "top gate",
    "router z",
    "dropped",
  )
  if found.layers[0].over_capacity is not None:
    columns = (*columns, "over capacity")
  return Table(columns=columns, rows=[row(layer) for layer in found.layers])


def _columns_in_words(found: Inspection) -> str:
  moe = found.config.moe
  assert moe is not None
  even = math.log(moe.num_experts)
  words = (
    "Max / mean is the busiest expert's load over an even share. Load entropy"
    f" is {even:.3f} (ln {moe.num_experts}) when load is even. Router entropy"
    " is that of one token's probabilities, the mean: low where the router is"
    " sure. Top gate is the mean of a token's largest gate, router z the mean"
    " squared logsumexp of its logits."
  )
  if not moe.is_causal:
    return f"{words} Dropped is the share of tokens that no expert took."
  words += (
    " Dropped is the share of assignments that found no slot; reading is"
    " dropless, as all evaluation is."
  )
  if moe.capacity_factor is not None:
    words += (
      " Over capacity is the share that the capacity factor of"
      f" {moe.capacity_factor:g}, with which the model trains, would have"
      " dropped of these batches."
    )
  return words


def domains(found: Inspection) -> Markup:
  """A map for each language, and how far they are apart."""
  noun = found.domain_noun
  title = f"By {noun}"
  parts = [
    element(
      "p",
      f"If experts take to a {noun}, its tokens go elsewhere than those of"
      f" another, so that load is shown for each {noun} alone.",
    )
  ]
  for k, name in enumerate(found.domains):
    chart = maps.grid_map(
      Panel(
        title=f"Load by layer and expert, {name}",
        values=np.stack(
          [layer.domain_load[k] * len(layer.load) for layer in found.layers]
        ),
      ),
      rows=layer_labels(found),
      scale=maps.EVEN_SHARE,
      corner="expert",
    )
    words = f"{name}: the load by {found.domain_tokens[k]:,} tokens of it."
    parts += [element("h3", name), figure(chart, words)]
  if len(found.domains) == 1:
    words = f"Only one {noun} was read, so that none can be compared."
    parts.append(element("p", words))
  else:
    parts += _distances(found)
  return page.section("domains", title, *parts)


def _distances(found: Inspection) -> list[Markup]:
  pairs = _pairs(found)
  rows = []
  for layer in found.layers:
    apart = [_apart(found, layer, *pair) for _, pair in pairs]
    rows.append(
      (
        str(layer.layer),
        *(f"{distance:.3f}" for distance, _ in apart),
        f"{max(chance for _, chance in apart):.3f}",
      )
    )
  table = Table(
    columns=("layer", *(name for name, _ in pairs), "by chance"), rows=rows
  )
  words = (
    "Total variation distance between two loads: the share of one"
    f" {found.domain_noun}'s assignments that would have to go to other experts"
    " for the loads to be the same, from 0 to 1. By chance is what two samples"
    " of one load would show at least, of as many tokens."
  )
  return [
    element("h3", f"How far {found.domain_noun}s are apart"),
    table.html(),
    element("p", words, class_="note"),
  ]


def _pairs(
  found: Inspection,
) -> list[tuple[str, tuple[list[int], list[int]]]]:
  """Whom to compare: each with each, or of many each with the others."""
  names, every = found.domains, range(len(found.domains))
  if len(names) <= _FEW_DOMAINS:
    return [
      (f"{names[a]} and {names[b]}", ([a], [b]))
      for a, b in itertools.combinations(every, 2)
    ]
  return [
    (f"{names[a]} and the others", ([a], [b for b in every if b != a]))
    for a in every
  ]


def _apart(
  found: Inspection, layer: LayerRouting, one: list[int], other: list[int]
) -> tuple[float, float]:
  """The distance of two groups of domains, and that by chance."""
  moe = found.config.moe
  assert moe is not None
  tokens = np.asarray(found.domain_tokens)

  def pooled(group: list[int]) -> np.ndarray:
    weights = tokens[group] / tokens[group].sum()
    return weights @ layer.domain_load[group]

  sizes = [int(tokens[group].sum()) * moe.top_k for group in (one, other)]
  return (
    measures.distance(pooled(one), pooled(other)),
    measures.chance_distance(layer.load, (sizes[0], sizes[1])),
  )


def classes(found: Inspection) -> Markup:
  """What kinds of tokens there are, and which experts meet them."""
  return page.section(
    "classes",
    "By class of token",
    element(
      "p",
      "Experts often take to kinds of tokens, such as a script, digits or"
      " punctuation, rather than to topics.",
    ),
    _class_table(found),
    _class_maps(found),
  )


def _class_table(found: Inspection) -> Markup:
  head = ("class", "tokens", "share", "distinct", "most frequent")
  rows = [
    (
      one.name,
      f"{one.tokens:,}",
      formats.percent(one.tokens / found.num_tokens),
      f"{one.distinct:,}",
      chips(found, [(token, "") for token in one.examples]),
    )
    for one in found.classes
  ]
  return Table(columns=head, rows=rows, words=(head[-1],)).html()


def _class_maps(found: Inspection) -> Markup:
  least = found.options.min_count
  shown = [i for i, one in enumerate(found.classes) if one.tokens >= least]
  if not shown:
    return element("p", f"No class has {least} tokens or more.")
  panels = []
  for layer in found.layers:
    known = np.where(layer.load > 0, layer.load, np.nan)
    panels.append(
      Panel(
        title=f"layer {layer.layer}", values=layer.class_load[shown] / known
      )
    )
  num_experts = len(found.layers[0].load)
  chart = maps.panels(
    panels,
    rows=[found.classes[i].name for i in shown],
    scale=maps.LIFT,
    cell=(64, 15),
    columns=3 if num_experts <= 32 else 2,
    description="Experts by class of token, layer by layer",
  )
  words = (
    "Each column is an expert, each row a class: the share of the class's"
    " assignments that go to the expert, over the expert's share of all. 1"
    " (grey) is where the class makes no difference."
  )
  if len(shown) < len(found.classes):
    words += f" Classes of fewer than {least} tokens are left out."
  return figure(chart, words)
