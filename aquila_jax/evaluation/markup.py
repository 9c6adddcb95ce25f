"""HTML and SVG elements. What is not an element already is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

_VOID = {"meta", "br", "img"}


class Markup(str):
  """Text that is markup already."""


def text(value: object) -> Markup:
  """`value` as markup: itself if it is, else escaped."""
  if isinstance(value, Markup):
    return value
  return Markup(html.escape(str(value)))


def join(children: Sequence[object], separator: str = "") -> Markup:
  """Children one after the other."""
  return Markup(text(separator).join(text(child) for child in children))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
  """One element.

  >>> element("a", "x < y", href="#top", class_="mark")
  '<a href="#top" class="mark">x &lt; y</a>'

  Args:
    name: of the element.
    *children: elements, or text to be escaped.
    **attributes: `_` stands for `-`, but at the end is left out, as in
      `class_`; None leaves the attribute out.

  Returns:
    The markup.
  """
  written = [
    f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  ]
  head = f"<{name}{''.join(written)}>"
  if name in _VOID:
    return Markup(head)
  return Markup(f"{head}{join(children)}</{name}>")
