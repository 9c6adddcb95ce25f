"""Small texts, and data prepared from them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from aquila_jax.core import config, errors
from aquila_jax.core.experiment_config import DataConfig
from aquila_jax.data.prepare import prepare
from aquila_jax.data.prepared import SPLITS, PreparedData, Split

_SYLLABLES = ("ka", "lo", "mi", "ren", "tu", "sol", "ve", "da", "fin", "gro")
_HAN = (
  "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往"
  "秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
)


class TextKit:
  """Makes texts, files and configs of chosen fields, in a folder of its own."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  def texts(
    self, number: int, *, seed: int = 0, language: str = "en"
  ) -> list[str]:
    """Different texts of 8 to 60 made-up words."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(number):
      count = int(generator.integers(8, 60))
      if language == "zh":
        text = "".join(generator.choice(list(_HAN), 3 * count)) + "。"
      else:
        words = [
          "".join(generator.choice(_SYLLABLES, int(generator.integers(1, 4))))
          for _ in range(count)
        ]
        text = " ".join(words).capitalize() + "."
      texts.append(text)
    return texts

  def jsonl(self, name: str, texts: list[str]) -> str:
    """Writes rows with a field `text`; returns the path."""
    path = self.folder / name
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)

  def config(self, sources: dict[str, Any], **fields: Any) -> DataConfig:
    """A config for small texts; sources are given as dicts."""
    defaults: dict[str, Any] = dict(
      sources=sources,
      tokenizer=dict(vocab_size=300),
      validation_share=0.1,
      test_share=0.1,
      cleaning=dict(min_characters=8),
    )
    return config.build(DataConfig, defaults | fields, path="config.data")

  def prepare(self, data: DataConfig, name: str = "data") -> PreparedData:
    """Prepares into the folder; what was said is in `messages`."""
    self.messages: list[str] = []
    prepare(data, self.folder / name, progress=self.messages.append)
    return PreparedData.open(self.folder / name)

  def refusal(self, data: DataConfig, name: str = "data") -> str:
    """The message with which a config is not prepared."""
    with pytest.raises(errors.UserError) as error:
      self.prepare(data, name)
    return str(error.value)

  def documents(
    self, data: PreparedData, source: str, split: Split | None = None
  ) -> list[str]:
    """The stored documents of a source as text; None is of every split.

    Each is framed by end of text.
    """
    if split is None:
      return [t for s in SPLITS for t in self.documents(data, source, s)]
    store = data.sources[source].splits[split]
    tokenizer, end = data.tokenizer(), data.end_of_text_id
    texts = []
    for i in range(store.num_documents):
      ids = store.read(i, 0, int(store.lengths[i])).tolist()
      assert ids[0] == ids[-1] == end and end not in ids[1:-1]
      texts.append(tokenizer.decode(ids[1:-1]))
    return texts

  def contents(self, folder: pathlib.Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {
      str(path.relative_to(folder)): path.read_bytes()
      for path in sorted(folder.rglob("*"))
      if path.is_file()
    }


@pytest.fixture
def kit(tmp_path: pathlib.Path) -> TextKit:
  return TextKit(tmp_path)


@pytest.fixture
def sources(kit: TextKit) -> dict[str, dict[str, Any]]:
  """An English source of 30 texts of seed 1, a Chinese one of 20 of seed 2."""
  chinese = kit.texts(20, seed=2, language="zh")
  return {
    "a": dict(path=kit.jsonl("a.jsonl", kit.texts(30, seed=1)), language="en"),
    "b": dict(path=kit.jsonl("b.jsonl", chinese), language="zh"),
  }


@pytest.fixture(scope="session")
def three_sources(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
  """Two English sources and a Chinese one, of weights 3, 1 and 2."""
  kit = TextKit(tmp_path_factory.mktemp("three"))
  texts = {
    "essays": (kit.texts(60, seed=1), "en", 3.0),
    "notes": (kit.texts(25, seed=2), "en", 1.0),
    "poems": (kit.texts(40, seed=3, language="zh"), "zh", 2.0),
  }
  sources = {
    name: dict(
      path=kit.jsonl(f"{name}.jsonl", rows), language=language, weight=weight
    )
    for name, (rows, language, weight) in texts.items()
  }
  return kit.prepare(kit.config(sources))
