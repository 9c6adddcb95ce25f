"""The page of `inspect_routing`: one HTML file that needs nothing else."""

from __future__ import annotations

from aquila_jax import version
from aquila_jax.evaluation import formats, page
from aquila_jax.evaluation.markup import Markup, element, join
from aquila_jax.evaluation.routing import expert_sections, load_sections
from aquila_jax.evaluation.routing.inspection import Inspection

_STYLE = """
h1 { overflow-wrap: anywhere; }
.cell { font-size: 10.5px; font-variant-numeric: tabular-nums; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.chips {
  display: flex; flex-wrap: wrap; gap: .25rem .35rem; min-width: 12rem;
}
.token {
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
    "Noto Sans Mono CJK SC", monospace;
  background: var(--raised); border: 1px solid var(--line); border-radius: 4px;
  padding: 0 .35rem; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate;
}
.token small { color: var(--soft); font-size: .72rem; }
@media (max-width: 40rem) { .chart { min-width: 42rem; } }
.warning { border-left: 4px solid var(--control); padding-left: 1rem; }
"""

_NOT_CAUSAL = (
  "In this model experts choose tokens. That is not causal: whether an expert"
  " takes a token depends on later tokens and on the other rows of a batch, and"
  " load is even by construction."
)


def render(found: Inspection) -> str:
  """The page; every text in it is escaped where it becomes an element."""
  sections = [
    ("result", "Overview", _overview(found)),
    ("load", "Load", load_sections.load(found)),
    ("domains", f"By {found.domain_noun}", load_sections.domains(found)),
    ("classes", "By class", load_sections.classes(found)),
    ("tokens", "Typical tokens", expert_sections.typical(found)),
    ("pairs", "Pairs", expert_sections.pairs(found)),
    ("distance", "Distance", expert_sections.distance(found)),
  ]
  header = element(
    "header",
    element(
      "p", "Where a mixture of experts sends its tokens", class_="kicker"
    ),
    element("h1", found.model),
  )
  return page.page(
    title=f"Routing of {found.model}",
    header=header,
    sections=sections,
    footer=f"Written by aquila_jax {version.VERSION}.",
    style=_STYLE,
  )


def _overview(found: Inspection) -> Markup:
  moe, worst = found.config.moe, found.worst
  assert moe is not None
  heading = (
    f"The busiest expert of layer {worst.layer} has"
    f" {formats.times(worst.max_over_mean)} times an even share"
  )
  card = element(
    "div",
    element("h2", heading, id="result-title"),
    _tiles(found),
    class_="result",
  )
  return element(
    "section",
    card,
    join([]) if moe.is_causal else element("p", _NOT_CAUSAL, class_="warning"),
    *(element("p", line) for line in _sentences(found)),
    id="result",
    class_="first",
    aria_labelledby="result-title",
  )


def _tiles(found: Inspection) -> Markup:
  moe, worst = found.config.moe, found.worst
  assert moe is not None
  num_dead = sum(map(len, found.dead().values()))
  size = f"{moe.num_experts} × {len(found.layers)}"
  tiles = [
    (f"{found.num_tokens:,}", "tokens read"),
    (size, "experts × layers with experts"),
    (str(moe.top_k), _top_k_in_words(found)),
    (
      formats.times(worst.max_over_mean),
      f"max / mean load of the worst layer, {worst.layer}",
    ),
    (str(num_dead), "dead experts"),
  ]
  return element(
    "ul",
    *(
      element("li", element("b", value), element("span", words))
      for value, words in tiles
    ),
    class_="tiles",
  )


def _top_k_in_words(found: Inspection) -> str:
  moe = found.config.moe
  assert moe is not None
  if not moe.is_causal:
    return "experts a token meets in the mean (top-k)"
  return "experts a token meets (top-k)"


def _sentences(found: Inspection) -> list[str]:
  moe, config = found.config.moe, found.config
  assert moe is not None
  shares = ", ".join(
    f"{name} {tokens:,}"
    for name, tokens in zip(found.domains, found.domain_tokens, strict=True)
  )
  lines = [
    f"Read: {found.text}; tokens by {found.domain_noun}: {shares}.",
    f"Router order: {moe.router_order}.",
    f"Dead experts, with less than {found.options.dead:g} of an even share:"
    f" {found.dead_in_words()}.",
  ]
  if config.is_mixed:
    layers = ", ".join(map(str, config.moe_layers))
    lines.append(
      f"Of {config.num_layers} layers these have experts: {layers}. The others"
      " have a dense FFN and are left out."
    )
  else:
    lines.append(f"All {config.num_layers} layers have experts.")
  return lines
