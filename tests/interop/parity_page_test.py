"""docs/parity.md says what was measured, and no more."""

from __future__ import annotations

import json
import re

import pytest

from tests.parity import page

_ROW = {
  "section": "pretrained",
  "model": "LlamaForCausalLM",
  "options": "none",
  "texts": 2,
  "tokens": 1234,
  "largest_difference": 1.26e-4,
  "decided": 1100,
  "same_best": 1100,
  "continued": 128,
  "continued_same": 121,
  "ties": 1,
  "versions": {"torch": "2.13.0"},
}
_WHOLE = [
  json.dumps(_ROW | {"section": section})
  for section in (
    *("imported", "another language", "pretrained"),
    *("QKV bias and experts", "upcycled", "exported"),
  )
]


def test_the_page_is_of_the_results_beside_it():
  results = json.loads(page.RESULTS.read_text(encoding="utf-8"))
  assert page.PAGE.read_text(encoding="utf-8") == page.render(results)


def test_the_results_hold():
  results = json.loads(page.RESULTS.read_text(encoding="utf-8"))
  for row in results["records"]:
    if row["section"] != page.UNLIMITED:
      assert row["largest_difference"] <= 2e-4, row
    assert row["same_best"] == row["decided"], row
    assert row["ties"] or row["continued_same"] == row["continued"], row


def test_a_row_and_the_head_of_the_page():
  text = page.render(page.report(_WHOLE))
  assert (
    "| Llama | none | 2 | 1,234 | 1.3e-04 | 1,100 of 1,100 |"
    " 121 of 128; 1 at a tie |\n" in text
  )
  assert "All 5 comparisons hold" in text
  assert "torch 2.13.0" in text
  assert re.findall(r"\{[^}]*\}", text) == []


def test_sections_are_in_order_whatever_the_order_of_the_records():
  found = page.report(_WHOLE)["records"]
  assert [row["section"] for row in found] == [
    "pretrained",
    "another language",
    "imported",
    "exported",
    "upcycled",
    "QKV bias and experts",
  ]


def test_a_part_of_a_run_writes_nothing():
  with pytest.raises(SystemExit) as refused:
    page.report(_WHOLE[:3])
  assert str(refused.value) == (
    "not a whole run, nothing is written: no ['QKV bias and experts',"
    " 'exported', 'upcycled']"
  )
