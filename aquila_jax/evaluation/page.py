"""The frame of a report: one HTML file that needs nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from aquila_jax.evaluation.markup import Markup, element, join

# Colours are variables, so that figures follow the reader's light or dark mode
# and paper. The six hues keep their order of lightness for the colour-blind.
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f6f7f9; --ink: #1b2330; --soft: #5b6675;
  --line: #dde2e8; --faint: #eceff3;
  --efficient: #0b5fb0; --control: #c4570a; --jump: #7a3fa0;
  --hue0: #0b5fb0; --hue1: #c2410c; --hue2: #0f7a5a; --hue3: #8b3fa8;
  --hue4: #8a6a00; --hue5: #b3245c;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #12161c; --raised: #1a2029; --ink: #e4e8ee; --soft: #98a3b3;
  --line: #303946; --faint: #222a34;
  --efficient: #69aef2; --control: #f39a52; --jump: #c79be8;
  --hue0: #69aef2; --hue1: #f39a52; --hue2: #5fcaa4; --hue3: #c79be8;
  --hue4: #d9bd54; --hue5: #f286ae;
} }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1.5rem; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC",
    "Source Han Sans SC", sans-serif;
}
.frame {
  display: grid; grid-template-columns: 10.5rem minmax(0, 57rem);
  gap: 3rem; max-width: 75rem; margin: 0 auto; padding: 3rem 2rem 6rem;
}
nav { position: sticky; top: 3rem; align-self: start; font-size: .875rem; }
nav ol { list-style: none; margin: 0; padding: 0; }
nav a {
  display: block; padding: .3rem 0 .3rem .9rem; color: var(--soft);
  border-left: 2px solid var(--line); text-decoration: none;
}
nav a:hover, nav a:focus { color: var(--ink); border-color: var(--efficient); }
header { margin-bottom: 2.5rem; }
.kicker { color: var(--soft); font-size: .875rem; margin: 0 0 .35rem; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.015em; margin: 0; }
h2 {
  font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em;
  margin: 0 0 .75rem; padding-top: 2.5rem; border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
section { margin-top: 3rem; }
section.first { margin-top: 0; }
section.first h2 { border: 0; padding: 0; font-size: 1.65rem; }
p { margin: 0 0 .9rem; max-width: 46rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; line-height: 1.55; }
.result {
  background: var(--raised); border: 1px solid var(--line);
  border-left: 4px solid var(--efficient); border-radius: 6px;
  padding: 1.75rem 1.9rem 1.2rem; margin-bottom: 1.5rem;
}
.result.behind { border-left-color: var(--control); }
.result.even, .result.open { border-left-color: var(--soft); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
  gap: 1.25rem; margin: 1.25rem 0 1.4rem; padding: 0; list-style: none;
}
.tiles b {
  display: block; font-size: 1.55rem; line-height: 1.25; font-weight: 650;
  letter-spacing: -.01em; font-variant-numeric: tabular-nums;
}
.tiles span { color: var(--soft); font-size: .8125rem; line-height: 1.4;
  display: block; }
.table { overflow-x: auto; margin: .5rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .84rem; min-width: 100%; }
th, td {
  text-align: left; vertical-align: top; padding: .42rem .75rem .42rem 0;
  border-bottom: 1px solid var(--line);
}
th:last-child, td:last-child { padding-right: 0; }
th {
  color: var(--soft); font-weight: 500; font-size: .78rem;
  vertical-align: bottom; line-height: 1.35;
}
td:first-child { font-weight: 550; }
.number {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
th.number { white-space: normal; }
.record td, .digest { overflow-wrap: anywhere; }
.record table { min-width: 0; } .record td:first-child { padding-right: 2rem; }
.record td:first-child { white-space: nowrap; font-weight: 400;
  color: var(--soft); }
figure { margin: 1.25rem 0 2.25rem; }
.chart { display: block; width: 100%; height: auto; }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; list-style: none;
  margin: 0 0 .5rem; padding: 0; font-size: .8125rem; color: var(--soft);
}
.legend li { display: flex; align-items: center; gap: .45rem; }
.key { width: 1.3rem; border-top: 2.5px solid; color: var(--ink); }
.key.dashed { border-top-style: dashed; }
.key.dot { width: .6rem; height: .6rem; border: 1.6px solid;
  border-radius: 50%; }
.key.jump { border-radius: 0; transform: rotate(45deg) scale(.8); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5rem; }
.label { font-size: 11px; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
.label.name { font-size: 11.5px; }
.label.strong { font-size: 12px; font-weight: 600; fill: var(--ink); }
.label { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.grid { stroke: var(--faint); } .axis { stroke: var(--soft); }
.vertical { stroke: var(--soft); stroke-dasharray: 2 3; stroke-width: .9; }
.level { stroke: var(--efficient); stroke-dasharray: 6 4; stroke-width: .9; }
.grid, .axis, .vertical, .level { fill: none; }
.line { fill: none; stroke: currentColor; stroke-linejoin: round; }
.smooth { stroke-width: 1.8; } .raw { stroke-width: 1; opacity: .28; }
.line.dashed { stroke-dasharray: 5 4; stroke-width: 1.4; }
.line.jump { stroke-dasharray: 1.5 3; stroke-width: 1.6; }
.dot { fill: var(--paper); stroke: currentColor; stroke-width: 1.5; }
.efficient { color: var(--efficient); } .control { color: var(--control); }
.jump { color: var(--jump); }
.hue0 { color: var(--hue0); } .hue1 { color: var(--hue1); }
.hue2 { color: var(--hue2); } .hue3 { color: var(--hue3); }
.hue4 { color: var(--hue4); } .hue5 { color: var(--hue5); }
.bar { fill: var(--line); } .bar.source { fill: var(--soft); }
.bar.used { fill: var(--jump); } .bar.trained { fill: var(--efficient); }
.bar.tried { fill: var(--jump); opacity: .42; }
.pixels { image-rendering: pixelated; }
.samples { display: grid; gap: .9rem; margin: .75rem 0 1.5rem; }
.samples p {
  margin: 0; padding: .7rem .95rem; border-radius: 5px; max-width: none;
  background: var(--raised); font-size: .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.samples b { font-weight: 650; } .samples small { color: var(--soft);
  font-size: .8125rem; display: block; margin-bottom: .15rem; }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 550; }
pre {
  overflow-x: auto; background: var(--raised); border-radius: 5px;
  padding: .9rem 1rem; font: .8rem/1.5 ui-monospace, "SF Mono", Menlo,
    Consolas, "Noto Sans Mono CJK SC", monospace;
}
footer { margin-top: 4rem; color: var(--soft); font-size: .8125rem; }
@media (max-width: 60rem) {
  .frame { display: block; padding: 1.5rem 1.1rem 4rem; }
  nav { position: static; margin-bottom: 2rem; }
  nav ol { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
  nav a { border: 0; padding: 0; text-decoration: underline; }
  .pair { display: block; } .result { padding: 1.25rem; }
}
@media (max-width: 40rem) {
  figure { overflow-x: auto; } .chart { min-width: 35rem; }
}
@media print {
  :root {
    --paper: #fff; --raised: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --faint: #e4e4e4; --efficient: #0b5fb0; --control: #c4570a;
    --jump: #7a3fa0; --hue0: #0b5fb0; --hue1: #c2410c; --hue2: #0f7a5a;
    --hue3: #8b3fa8; --hue4: #8a6a00; --hue5: #b3245c;
  }
  body { font-size: 10.5pt; }
  .frame { display: block; padding: 0; max-width: none; }
  nav { display: none; } table { font-size: 8pt; }
  section { margin-top: 1.5rem; }
  figure, .result, tr, .samples p { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""


def section(key: str, title: str, *children: object) -> Markup:
  """A section with a heading that the table of contents can point to."""
  heading = element("h2", title, id=f"{key}-title")
  return element(
    "section", heading, *children, id=key, aria_labelledby=f"{key}-title"
  )


def page(
  *,
  title: str,
  header: Markup,
  sections: Sequence[tuple[str, str, Markup]],
  footer: str,
  style: str = "",
) -> str:
  """The whole file.

  Args:
    title: of the window.
    header: above the sections.
    sections: key, name in the table of contents, and markup of each.
    footer: below them.
    style: rules of this page, behind those of all.

  Returns:
    HTML.
  """
  entries = [
    element("li", element("a", name, href=f"#{key}"))
    for key, name, _ in sections
  ]
  contents = element("nav", element("ol", *entries), aria_label="Contents")
  body = element(
    "main",
    header,
    *(markup for _, _, markup in sections),
    element("footer", footer),
  )
  head = element(
    "head",
    element("meta", charset="utf-8"),
    element(
      "meta", name="viewport", content="width=device-width, initial-scale=1"
    ),
    # Nothing may be loaded, whatever a text in here says.
    element(
      "meta",
      http_equiv="Content-Security-Policy",
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    ),
    element("title", title),
    element("style", Markup(_STYLE + style)),
  )
  frame = element("div", contents, body, class_="frame")
  html = element("html", head, element("body", frame), lang="en")
  return join([Markup("<!DOCTYPE html>\n"), html, "\n"])
