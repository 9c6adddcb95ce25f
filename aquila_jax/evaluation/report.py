"""report.html: one self-contained file with everything that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from aquila_jax.core import files
from aquila_jax.evaluation import (
  data_section,
  expert_plots,
  formats,
  page,
  plots,
  summary,
  tables,
)
from aquila_jax.evaluation.headline import METHOD, Headline
from aquila_jax.evaluation.markup import Markup, element, join
from aquila_jax.evaluation.plots import Along
from aquila_jax.evaluation.results import Point, ReportInput, Sample


def write_report(directory: epath.PathLike, report: ReportInput) -> epath.Path:
  """Writes report.html and summary.json into a directory.

  Each is replaced as a whole, so a reader never finds half a file.

  Args:
    directory: made if missing.
    report: the experiment.

  Returns:
    The path of report.html.
  """
  target = epath.Path(directory)
  target.mkdir(parents=True, exist_ok=True)
  numbers = json.dumps(
    summary.summary(report), indent=2, ensure_ascii=False, allow_nan=False
  )
  files.replace_text(target / "summary.json", numbers + "\n")
  files.replace_text(target / "report.html", render_report(report))
  return target / "report.html"


def render_report(report: ReportInput) -> str:
  """The page; every text in it is escaped where it becomes an element."""
  results = summary.headlines(report)
  points = _all_points(report)
  flops, wall = plots.along_flops(points), plots.along_wall(points)
  sections = [
    ("result", "Result", _result(report, results)),
    ("stages", "Stages", _stages(report)),
    ("curves", "Loss curves", _curves(report, flops, wall, results)),
    ("transforms", "Transforms", _transforms(report)),
    ("evaluation", "Evaluation", _evaluation(report, flops)),
    ("experts", "Experts", _experts(report, flops)),
    ("optimisation", "Learning rate, speed", _speed(report, flops, wall)),
    ("samples", "Samples", _samples(report)),
    ("data", "Data", _data(report)),
    ("machine", "Machine, versions", _machine(report)),
    ("configuration", "Configuration", _configuration(report)),
  ]
  return page.page(
    title=f"{report.name}: EfficientScale report",
    header=_header(report),
    sections=sections,
    footer=_footer(report),
  )


def _all_points(report: ReportInput) -> list[Point]:
  return [p for stage in report.stages for p in stage.curve("loss")]


def _header(report: ReportInput) -> Markup:
  about = " · ".join(
    filter(
      None,
      [
        "EfficientScale report",
        report.created,
        str(report.machine.get("device", "")),
      ],
    )
  )
  return element(
    "header",
    element("p", about, class_="kicker"),
    element("h1", report.name),
  )


def _result(report: ReportInput, results: list[Headline]) -> Markup:
  if not results:
    card = element(
      "div",
      element("h2", _no_headline(report), id="result-title"),
      class_="result open",
    )
    return element("section", card, id="result", class_="first")
  cards = [
    element(
      "div",
      element("h2", result.title, id=f"result-title-{i}"),
      _tiles(result),
      *(element("p", sentence) for sentence in result.sentences),
      class_=f"result {result.outcome}",
    )
    for i, result in enumerate(results)
  ]
  return element(
    "section",
    *cards,
    element("p", METHOD, class_="note"),
    id="result",
    class_="first",
    aria_labelledby="result-title-0",
  )


def _no_headline(report: ReportInput) -> str:
  if not report.controls:
    return "This experiment has no control, so there is nothing to compare with"
  return (
    "Nothing to compare: the final stage and the control need validations"
    " while training (train.evaluate_every)"
  )


def _tiles(result: Headline) -> Markup:
  other, difference = result.control_loss_at_same_flops, result.loss_difference
  ratio = formats.times(result.flops_ratio) + "×"
  tiles = [
    (formats.loss(result.loss), "nats/token: EfficientScale's final loss"),
    (
      "–" if other is None else formats.loss(other),
      "nats/token: the control at the same FLOPs"
      + ("" if difference is None else f" ({formats.signed(difference)})"),
    ),
    (
      ratio if result.reached else "not reached",
      "EfficientScale's FLOPs: what the control needed for that loss"
      if result.reached
      else f"by the control, with {ratio} EfficientScale's FLOPs",
    ),
  ]
  return element(
    "ul",
    *(
      element("li", element("b", number), element("span", words))
      for number, words in tiles
    ),
    class_="tiles",
  )


def _stages(report: ReportInput) -> Markup:
  return page.section(
    "stages",
    "Stages",
    element(
      "p",
      "Active parameters are those that one token meets. FLOPs are those of"
      " matrix products, forward and backward; time is training alone, without"
      " compilation and validation; goodput is the share of all wall time that"
      " was spent in steps.",
      class_="note",
    ),
    tables.stage_table(report).html(),
  )


def _curves(
  report: ReportInput, flops: Along, wall: Along, results: list[Headline]
) -> Markup:
  result = results[0] if results else None
  if not _all_points(report):
    return page.section(
      "curves", "Loss curves", element("p", "No step was logged.")
    )
  return page.section(
    "curves",
    "Loss against compute and time",
    element("h3", "Against training FLOPs"),
    plots.loss_figure(report, flops, result=result),
    element("h3", "Against training time"),
    plots.loss_figure(report, wall, result=result),
  )


def _transforms(report: ReportInput) -> Markup:
  figure = plots.transform_figure(report)
  table = tables.transform_table(report)
  if figure is None or table is None:
    body = [element("p", "No stage of this experiment grows another.")]
  else:
    body = [figure, table.html()]
  return page.section("transforms", "Loss around the transforms", *body)


def _evaluation(report: ReportInput, flops: Along) -> Markup:
  return page.section(
    "evaluation",
    "Evaluation",
    element(
      "p",
      f"On held-out documents (the {report.split} split), after training."
      " Perplexity depends on the tokenizer; bits per byte, the loss per byte"
      " of UTF-8 text, does not.",
      class_="note",
    ),
    tables.evaluation_table(report).html(),
    plots.language_figure(report, flops) or "",
  )


def _experts(report: ReportInput, flops: Along) -> Markup:
  maps = [
    join([element("h3", stage.name), expert_plots.load_maps(stage)])
    for stage in report.stages
    if stage.has_experts
  ]
  if not maps:
    maps = [element("p", "No stage of this experiment has experts.")]
  balance = expert_plots.balance_figure(report, flops)
  return page.section(
    "experts", "Expert load", balance if balance else "", *maps
  )


def _speed(report: ReportInput, flops: Along, wall: Along) -> Markup:
  rate = plots.field_figure(
    report,
    flops,
    key="learning_rate",
    label="learning rate",
    scaled=True,
    caption="The learning rate of AdamW: one schedule a stage.",
  )
  pair = [
    plots.field_figure(
      report,
      wall,
      key="tokens_per_s",
      label="tokens/s",
      caption="Training tokens a second.",
      width=390,
    ),
    plots.field_figure(
      report,
      wall,
      key="mfu",
      label="MFU",
      caption="Model FLOPs utilisation: of the measured or known peak of a"
      " plain matrix product.",
      percent=True,
      width=390,
    ),
  ]
  return page.section(
    "optimisation",
    "Learning rate and speed",
    rate or "",
    element("div", *(figure or "" for figure in pair), class_="pair"),
  )


def _samples(report: ReportInput) -> Markup:
  blocks = [
    part
    for stage in report.stages
    if stage.samples
    for part in (
      element("h3", stage.name),
      element("div", *map(_sample, stage.samples), class_="samples"),
    )
  ]
  if not blocks:
    blocks = [element("p", "No prompts were given (evaluation.prompts).")]
  return page.section(
    "samples",
    "Sampled continuations",
    element("p", "The prompt is in bold. Nothing was selected.", class_="note"),
    *blocks,
  )


def _sample(sample: Sample) -> Markup:
  # The language decides the shapes of ideographs.
  chinese = any("\u4e00" <= c <= "\u9fff" for c in sample.prompt + sample.text)
  return element(
    "p",
    element("b", sample.prompt),
    sample.text,
    lang="zh" if chinese else None,
  )


def _data(report: ReportInput) -> Markup:
  parts = data_section.tables_of(report.dataset_card)
  if not parts:
    parts = [element("p", "The experiment has no dataset card.")]
  return page.section("data", "Dataset card", *parts)


def _record(title: str, record: Mapping[str, Any]) -> Markup:
  table = tables.record_table(title, record)
  return element("div", table.html(), class_="record")


def _machine(report: ReportInput) -> Markup:
  return page.section(
    "machine",
    "Machine and versions",
    _record("machine", report.machine) if report.machine else "",
    _record("package", report.versions) if report.versions else "",
  )


def _configuration(report: ReportInput) -> Markup:
  configs = [("experiment", report.config)]
  configs += [(stage.name, stage.config) for stage in report.stages]
  return page.section(
    "configuration",
    "Configuration",
    element("p", "As resolved, defaults included.", class_="note"),
    *(
      element(
        "details",
        element("summary", name),
        element(
          "pre",
          json.dumps(config, indent=2, ensure_ascii=False, default=str),
        ),
      )
      for name, config in configs
      if config
    ),
  )


def _footer(report: ReportInput) -> str:
  version = report.versions.get("aquila_jax", "")
  return f"Written by aquila_jax {version}".strip() + "."
