"""Escaping happens where an element is made, and once."""

from __future__ import annotations

from aquila_jax.evaluation.markup import Markup, element, join


def test_text_and_attributes_are_escaped():
  found = element("a", "x < y & z", title='say "no"', class_="mark", data_x=1)
  assert found == (
    '<a title="say &quot;no&quot;" class="mark" data-x="1">x &lt; y &amp; z</a>'
  )


def test_elements_are_not_escaped_again():
  inner = element("b", "<")
  assert element("p", inner, "<") == "<p><b>&lt;</b>&lt;</p>"
  assert join([inner, "&"], ", ") == "<b>&lt;</b>, &amp;"


def test_void_elements_and_missing_attributes():
  assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
  assert element("td", 1, class_=None) == "<td>1</td>"
  assert isinstance(element("p"), Markup)
