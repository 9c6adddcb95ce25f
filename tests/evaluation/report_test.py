"""The page as a browser's parser sees it."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from aquila_jax.evaluation import report as report_lib
from tests.evaluation import tiny
from tests.evaluation.parsed_page import Page

SECTIONS = [
  "result",
  "stages",
  "curves",
  "transforms",
  "evaluation",
  "experts",
  "optimisation",
  "samples",
  "data",
  "machine",
  "configuration",
]


@pytest.fixture(scope="module")
def source() -> str:
  return report_lib.render_report(tiny.experiment())


@pytest.fixture(scope="module")
def parsed(source) -> Page:
  return Page(source)


def test_all_sections_stand_in_the_order_of_the_contents(parsed):
  links = [v for v in parsed.values("href") if v.startswith("#")]
  assert links == [f"#{key}" for key in SECTIONS]
  ids = parsed.values("id")
  assert [key for key in ids if key in SECTIONS] == SECTIONS
  assert len(ids) == len(set(ids))


def test_nothing_is_loaded_from_anywhere(source, parsed):
  assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
  for name in ("src", "href", "action", "srcset"):
    for value in parsed.values(name):
      assert value.startswith(("#", "data:image/png;base64,"))
  assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
  assert (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    in parsed.values("content")
  )


def test_every_text_is_escaped(source, parsed):
  assert "<script" not in source
  # Name (title and heading), sample and config.
  assert parsed.text.count(tiny.NASTY) == 4


def test_figures_have_axes_with_units_and_an_explanation(parsed):
  # Two of loss, transforms, languages, balance, two maps, rate, speed, MFU.
  assert parsed.tags.count("figure") == 10
  assert parsed.tags.count("figcaption") == 10
  for label in (
    "training FLOPs, ancestors included (× 10¹⁰)",
    "training time, ancestors included (s)",
    "loss, nats/token",
    "learning rate (× 10⁻³)",
    "tokens/s",
    "× even share",
  ):
    assert label in parsed.text


def test_the_numbers_of_the_tables(parsed):
  for words in (
    "The control did not reach EfficientScale's loss with the same FLOPs",
    "327K",
    "9.00 × 10¹⁰",
    "scale up, AKI-Pro",
    "AKI-Pro (used)",
    "+3.500",
    "1.202",  # bits per byte: 2.5 nats / (ln 2 * 3 bytes)
    "Apache-2.0",
    "2,000",  # documents of a language, two sources of 1,000
    "exact duplicate",
    "3.11.9",
  ):
    assert words in parsed.text, words


def test_no_number_of_the_page_is_nan(source):
  assert not re.search(r"\b(nan|inf|None)\b", source)


def test_chinese_samples_are_marked_as_chinese(parsed):
  assert parsed.values("lang") == ["en", "zh"]


def test_an_experiment_of_one_stage_says_what_it_lacks():
  whole = tiny.experiment()
  bare = tiny.stage("only")
  page = Page(
    report_lib.render_report(
      dataclasses.replace(whole, stages=[bare], dataset_card={})
    )
  )
  for words in (
    "This experiment has no control, so there is nothing to compare with",
    "No stage of this experiment grows another.",
    "No stage of this experiment has experts.",
    "No prompts were given (evaluation.prompts).",
    "The experiment has no dataset card.",
  ):
    assert words in page.text
  assert [key for key in page.values("id") if key in SECTIONS] == SECTIONS


def test_stages_without_any_row_or_number_make_a_page():
  silent = tiny.stage("silent", validation=[])
  silent = dataclasses.replace(silent, rows=[])
  report = dataclasses.replace(tiny.experiment(), stages=[silent])
  assert "No step was logged." in Page(report_lib.render_report(report)).text


def test_a_control_without_validations_is_said_to_be_missing_them():
  control = tiny.stage("control", is_control=True, validation=[])
  report = tiny.with_control(tiny.experiment(), control)
  text = Page(report_lib.render_report(report)).text
  assert (
    "Nothing to compare: the final stage and the control need validations while"
    " training (train.evaluate_every)" in text
  )


def test_both_files_are_written_whole(tmp_path):
  directory = tmp_path / "new" / "run"
  path = report_lib.write_report(directory, tiny.experiment())
  assert path.name == "report.html"
  assert sorted(p.name for p in directory.iterdir()) == [
    "report.html",
    "summary.json",
  ]
  Page((directory / "report.html").read_text(encoding="utf-8"))
  summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
  assert summary["headlines"][0]["loss_difference"] == 0.5


def test_a_second_report_replaces_the_first(tmp_path):
  report_lib.write_report(tmp_path, tiny.experiment())
  path = report_lib.write_report(tmp_path, tiny.experiment(name="again"))
  assert "<h1>again</h1>" in path.read_text()
