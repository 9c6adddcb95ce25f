"""A page as a browser's parser sees it."""

from __future__ import annotations

import html.parser

VOID = {"meta", "br", "img"}


class Page(html.parser.HTMLParser):
  """Elements, attributes and text; fails on a tag that does not fit."""

  def __init__(self, source: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str]] = []
    self.text = ""
    self.feed(source)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(name, value or "") for name, value in attrs]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += data

  def values(self, name: str) -> list[str]:
    return [value for key, value in self.attributes if key == name]
