"""The page and the JSON, of counts that are made by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.evaluation.routing import maps, routing_page
from aquila_jax.evaluation.routing.cosines import LayerCosines
from aquila_jax.evaluation.routing.inspection import (
  Inspection,
  Options,
  inspection,
)
from aquila_jax.evaluation.routing.token_text import TokenText
from tests.evaluation.parsed_page import Page
from tests.evaluation.routing import tiny_moe

SECTIONS = [
  "result",
  "load",
  "domains",
  "classes",
  "tokens",
  "pairs",
  "distance",
]
NASTY = "<script>&\"'"
MIXED = tiny_moe.with_moe(4, layers=(1, 3), num_experts=3)
# Bytes: "a" goes to experts 0 and 1, a space to 0 and 1, 0xE6 once to 0 and 2.
TEXT = [97, 97, 97, 32, 97, 0xE6]
EXPERTS = [[0, 1]] * 5 + [[0, 2]]


def _cosines(layer: int) -> LayerCosines:
  between = np.array([[1, 0.5, 0.25], [0.5, 1, 0], [0.25, 0, 1]])
  return LayerCosines(
    layer=layer,
    between=between,
    to_parent=np.array([0.75, 0.5, np.nan]),
    copies=between > 0.4,
  )


def _inspection(
  config: ModelConfig = MIXED, *, experts=EXPERTS, **changes
) -> Inspection:
  fields: dict[str, Any] = dict(
    model=f"runs/{NASTY}",
    text=f"{NASTY}.txt",
    config=config,
    options=Options(dead=0.3, min_count=2, typical=3),
    domain_noun="domain",
    domains=("en", "none", NASTY),
    token_text=TokenText(None),
    cosines=[_cosines(1), _cosines(3)],
    parent="The parent is dense.",
  )
  counts = tiny_moe.counted(
    TEXT, experts, domains=[0, 0, 0, 0, 2, 2], layers=config.moe_layers
  )
  return inspection(counts, **(fields | changes))


@pytest.fixture(scope="module")
def source() -> str:
  return routing_page.render(_inspection())


@pytest.fixture(scope="module")
def parsed(source) -> Page:
  return Page(source)


def test_all_sections_stand_in_the_order_of_the_contents(parsed):
  links = [v for v in parsed.values("href") if v.startswith("#")]
  assert links == [f"#{key}" for key in SECTIONS]
  ids = parsed.values("id")
  assert [key for key in ids if key in SECTIONS] == SECTIONS
  assert len(ids) == len(set(ids))


def test_nothing_is_loaded_and_nothing_runs(source, parsed):
  assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
  assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
  for name in ("src", "href", "action", "srcset"):
    for value in parsed.values(name):
      assert value.startswith(("#", "data:image/png;base64,"))
  assert "prefers-color-scheme: dark" in source


def test_every_text_is_escaped(source, parsed):
  assert "<script" not in source
  # Title, heading, text, heading and caption of the domain, column, list.
  assert parsed.text.count(NASTY) >= 6


def test_no_number_of_the_page_is_nan(source):
  assert not re.search(r"\b(nan|inf|None)\b", source)


def test_the_overview(parsed):
  for words in (
    # 6 of 12 assignments are of expert 0: 1.5 of 4.
    "The busiest expert of layer 1 has 1.50 times an even share",
    "3 × 2",
    "experts a token meets (top-k)",
    "tokens by domain: en 4, " + NASTY + " 2.",
    "Router order: topk_then_softmax.",
    # 1 of 12 assignments: 0.25 of an even share, below 0.3.
    "Dead experts, with less than 0.3 of an even share: layer 1: expert 2;"
    " layer 3: expert 2.",
    "Of 4 layers these have experts: 1, 3. The others have a dense FFN and are"
    " left out.",
  ):
    assert words in parsed.text, words
  assert "layer 0" not in parsed.text and "layer 2" not in parsed.text


def test_the_numbers_of_the_sections(parsed):
  for words in (
    # Maps: two layers, for all text and each domain, under the pointer.
    "Load by layer and expert, layer 3: 0: 1.50, 1: 1.25, 2: 0.25",
    "Load by layer and expert, en, layer 1: 0: 1.50, 1: 1.50, 2: 0.00",
    # Distance of domains: a quarter goes to expert 2 in place of 1.
    "en and " + NASTY,
    "0.250",
    "Latin",
    "byte fragment",
    "⟨E6⟩",
    # The class of "a": half of its assignments, 6 / 12 of all.
    "layer 1, Latin: 0: 1.00, 1: 1.20, 2: 0.00",
    " 100% of 4",
    # Loads 6, 5, 1 explain 30 : 6 : 5 of 6 tokens: 5 / (30 * 6 / 41).
    "0 and 1 (1.14×, 83.3%); 0 and 2 (1.14×, 16.7%)",
    "1 and 2 (0.00×, 0%)",
    "The parent is dense.",
    # Mean and least cosine of all pairs, of copies, and to the parent.
    "0.2500.0000.5000.5000.6250.5001",
    "Cosine to the parent, layer 3: 0: 0.750, 1: 0.500",
  ):
    assert words in parsed.text, words
  # Load, two domains, classes, pairs, parent, cosines.
  assert parsed.tags.count("figure") == parsed.tags.count("figcaption") == 7


def test_dead_experts_are_named():
  found = _inspection()
  assert found.dead() == {1: [2], 3: [2]}
  many = dataclasses.replace(
    found, options=dataclasses.replace(found.options, dead=1.3)
  )
  assert many.dead_in_words() == "layer 1: experts 1, 2; layer 3: experts 1, 2"
  none = dataclasses.replace(
    found, options=dataclasses.replace(found.options, dead=0.2)
  )
  assert none.dead_in_words() == "none"


def test_json_has_all_numbers():
  record = json.loads(json.dumps(_inspection().to_json(), allow_nan=False))
  assert record["domains"] == {"en": 4, NASTY: 2}
  assert (record["tokens"], record["worst_layer"]) == (6, 1)
  assert record["dead"] == {"1": [2], "3": [2]}
  assert [one["name"] for one in record["classes"]] == [
    "Latin",
    "whitespace",
    "byte fragment",
  ]
  layer = record["layers"][1]
  assert layer["layer"] == 3
  assert layer["load"] == pytest.approx([6 / 12, 5 / 12, 1 / 12])
  assert layer["domain_load"]["en"] == pytest.approx([0.5, 0.5, 0])
  assert layer["domain_distance"][0] == pytest.approx([0, 0.25])
  assert layer["class_load"]["byte fragment"] == pytest.approx([0.5, 0, 0.5])
  assert layer["tokens_together"] == [[6, 5, 1], [5, 5, 0], [1, 0, 1]]
  assert layer["pair_lift"][0][0] is None
  assert layer["typical_tokens"][1] == [
    {"text": "a", "token": 97, "count": 4, "share": 1.0, "lift": 1.2}
  ]
  assert layer["cosine_to_parent"] == [0.75, 0.5, None]


def test_one_expert_a_token_one_domain_and_no_parent():
  config = tiny_moe.with_moe(top_k=1, num_experts=3, capacity_factor=None)
  found = _inspection(
    config,
    experts=[[0]] * 6,
    domains=("en", "none", "zh"),
    parent="",
    cosines=[
      dataclasses.replace(_cosines(layer), to_parent=None, copies=None)
      for layer in (0, 1)
    ],
  )
  alone = dataclasses.replace(found, domains=("en",), domain_tokens=(6,))
  text = Page(routing_page.render(alone)).text
  for words in (
    "so that there are no pairs",
    "Only one domain was read, so that none can be compared.",
    "Without a parent to compare with.",
    "All 2 layers have experts.",
  ):
    assert words in text, words
  assert "over capacity" not in text and "to the parent, mean" not in text


def test_experts_that_choose_are_warned_of():
  config = tiny_moe.with_moe(
    num_experts=3,
    choice="expert",
    router_order="sigmoid",
    renormalise=False,
    capacity_factor=None,
  )
  page = Page(routing_page.render(_inspection(config)))
  assert "That is not causal" in page.text
  assert "experts a token meets in the mean (top-k)" in page.text
  assert "the share of tokens that no expert took" in page.text
  assert "warning" in page.values("class")


def test_the_scale_of_cosines_reaches_to_the_least():
  near = maps.cosine_scale([np.array([1.0, 0.985]), np.array([np.nan])])
  assert near.ticks == ((1.0, "1"), (0.99, "0.99"), (0.98, "0.98"))
  np.testing.assert_allclose(
    near.to_share(np.array([1.0, 0.99, 0.98])), [0.5, 0.75, 1]
  )
  far = maps.cosine_scale([np.array([-1.0])])
  assert [label for _, label in far.ticks] == ["1", "0", "−1"]
  assert maps.cosine_scale([]).ticks[2] == (0.99, "0.99")
