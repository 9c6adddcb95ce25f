"""Sections of the page on single experts: tokens, pairs, distance."""

from __future__ import annotations

import numpy as np

from aquila_jax.evaluation import formats, page
from aquila_jax.evaluation.markup import Markup, element, join
from aquila_jax.evaluation.plots import figure
from aquila_jax.evaluation.routing import maps, measures
from aquila_jax.evaluation.routing.cosines import LayerCosines
from aquila_jax.evaluation.routing.inspection import Inspection
from aquila_jax.evaluation.routing.load_sections import chips, layer_labels
from aquila_jax.evaluation.routing.maps import Panel, Scale
from aquila_jax.evaluation.tables import Table

_MOST_EXPERTS = 64  # of a map of all pairs
_PAIRS = 3  # that are named of a layer
_PANEL = 160.0  # the largest width of a map of pairs


def typical(found: Inspection) -> Markup:
  """For every layer a table, folded but for the first."""
  options = found.options
  words = (
    "The tokens that each expert meets most often for how often it meets any:"
    " those with the highest lift, P(expert | token) over P(expert), among the"
    f" tokens that occurred at least {options.min_count} times."
  )
  note = (
    "Behind a token: how often it met the expert, and of how many occurrences."
    " ␣ is a space, ↵ a line end, ⇥ a tab; ⟨E4 BD⟩ are bytes that are no whole"
    " character."
  )
  return page.section(
    "tokens",
    "Typical tokens",
    element("p", words),
    element("p", note, class_="note"),
    *(_typical_layer(found, row) for row in range(len(found.layers))),
  )


def _typical_layer(found: Inspection, row: int) -> Markup:
  layer = found.layers[row]
  rows = []
  for expert, tokens in enumerate(found.typical[row]):
    cell = chips(
      found,
      [(t.token, f" {100 * t.share:.0f}% of {t.count:,}") for t in tokens],
    )
    rows.append(
      (
        str(expert),
        formats.times(float(layer.relative_load[expert])),
        cell if tokens else "none",
      )
    )
  table = Table(
    columns=("expert", "load", "typical tokens"),
    rows=rows,
    words=("typical tokens",),
  )
  return element(
    "details",
    element("summary", f"layer {layer.layer}"),
    table.html(),
    open="open" if row == 0 else None,
  )


def pairs(found: Inspection) -> Markup:
  """Which experts are met by the same tokens."""
  if not found.has_pairs:
    words = (
      "A token meets one expert of this model, so that there are no pairs."
    )
    return page.section("pairs", "Pairs of experts", element("p", words))
  lifts = [measures.pair_lift(layer.together) for layer in found.layers]
  return page.section(
    "pairs",
    "Pairs of experts",
    element(
      "p",
      "A token meets several experts, and some pairs are met together more"
      " often than the loads of the two explain.",
    ),
    _pair_maps(
      found,
      lifts,
      scale=maps.LIFT,
      description="Pairs of experts that a token meets, layer by layer",
      words="The tokens that meet both experts of a pair, over what their loads"
      " explain: the product of the two, times one factor a layer that makes"
      " the sum over pairs right.",
    ),
    _pair_table(found, lifts).html(),
    element(
      "p",
      "In brackets: how often the pair is met over what its loads explain, and"
      " the share of tokens that meet both.",
      class_="note",
    ),
  )


def _pair_table(found: Inspection, lifts: list[np.ndarray]) -> Table:
  columns = ("layer", "most often together", "most seldom together")
  rows = []
  for layer, lift in zip(found.layers, lifts, strict=True):
    share = layer.together / max(found.num_tokens, 1)
    seldom, often = _extreme_pairs(lift)
    in_words = [
      "; ".join(
        f"{a} and {b} ({formats.times(float(lift[a, b]))}×,"
        f" {formats.percent(float(share[a, b]))})"
        for a, b in chosen
      )
      for chosen in (often, seldom)
    ]
    rows.append((str(layer.layer), *(words or "none" for words in in_words)))
  return Table(columns=columns, rows=rows, words=columns[1:])


def _extreme_pairs(
  lift: np.ndarray,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
  """The pairs of the lowest lift below 1, and of the highest above it."""
  first, second = np.triu_indices(len(lift), 1)
  values = lift[first, second]
  rising, falling = (np.argsort(v, kind="stable") for v in (values, -values))
  below = [i for i in rising if values[i] < 1][:_PAIRS]
  above = [i for i in falling if values[i] > 1][:_PAIRS]

  def named(chosen: list) -> list[tuple[int, int]]:
    return [(int(first[i]), int(second[i])) for i in chosen]

  return named(below), named(above)


def _pair_maps(
  found: Inspection,
  values: list[np.ndarray],
  *,
  scale: Scale,
  description: str,
  words: str,
) -> Markup:
  """A square map a layer; none where it would be too small to read."""
  num_experts = len(values[0])
  if num_experts > _MOST_EXPERTS:
    why = (
      f"Maps of {num_experts} experts are left out: they would be too small."
    )
    return element("p", why, class_="note")
  side = min(38.0, _PANEL / num_experts)
  chart = maps.panels(
    [
      Panel(title=label, values=of_layer)
      for label, of_layer in zip(layer_labels(found), values, strict=True)
    ],
    rows=[str(expert) for expert in range(num_experts)],
    scale=scale,
    cell=(side, side),
    columns=4,
    description=description,
  )
  return figure(chart, words)


def distance(found: Inspection) -> Markup:
  """How far copies have moved apart."""
  between = [layer.between for layer in found.cosines]
  return page.section(
    "distance",
    "How far experts have moved apart",
    element(
      "p",
      "Experts that were made as copies are the same at first, and a cosine of"
      " 1 between two of them says that they still are.",
    ),
    element("p", found.parent or "Without a parent to compare with."),
    _parent_map(found),
    _cosine_table(found.cosines).html(),
    _pair_maps(
      found,
      between,
      scale=maps.cosine_scale(between),
      description="Cosine between experts, layer by layer",
      words="The cosine between every two experts of a layer: grey where they"
      " are the same, the more orange the further apart.",
    ),
    element(
      "p",
      "A cosine is of the kernels of two FFNs: the mean of those of gate, up"
      " and down, each taken as one vector. A factor that growth put on a"
      " kernel does not change it.",
      class_="note",
    ),
  )


def _parent_map(found: Inspection) -> Markup:
  to_parent = [layer.to_parent for layer in found.cosines]
  known = [cosine for cosine in to_parent if cosine is not None]
  if not known:
    return join([])
  chart = maps.grid_map(
    Panel(title="Cosine to the parent", values=np.stack(known)),
    rows=layer_labels(found),
    scale=maps.cosine_scale(known),
    corner="expert",
  )
  return figure(
    chart, "The cosine of each expert to the part of the parent it was made of."
  )


def _cosine_table(layers: list[LayerCosines]) -> Table:
  has_parent = layers[0].to_parent is not None
  columns = ["layer", "all pairs, mean", "least"]
  if has_parent:
    columns += ["copies of one FFN, mean", "least", "to the parent, mean"]
    columns += ["least", "of expert"]
  rows = []
  for layer in layers:
    row = [str(layer.layer), *_mean_and_least(layer.pairs())]
    if layer.to_parent is not None:
      row += _mean_and_least(layer.pairs(of_copies=True))
      known = layer.to_parent[np.isfinite(layer.to_parent)]
      row += _mean_and_least(known)
      row.append(str(int(np.nanargmin(layer.to_parent))) if len(known) else "")
    rows.append(tuple(row))
  return Table(columns=tuple(columns), rows=rows)


def _mean_and_least(cosines: np.ndarray) -> tuple[str, str]:
  if not len(cosines):
    return ("–", "–")
  return (
    maps.cosine(float(cosines.mean())),
    maps.cosine(float(cosines.min())),
  )
