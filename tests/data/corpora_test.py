"""The corpora by name, and that each is pinned."""

from __future__ import annotations

import dataclasses

import pytest

from aquila_jax.core import errors
from aquila_jax.data import corpora


def test_a_wrong_name_gets_the_nearest():
  with pytest.raises(errors.UserError) as error:
    corpora.lookup("jionpl", field="config.data.sources.x.path")
  assert str(error.value) == (
    "config.data.sources.x.path='corpus:jionpl': there is no such corpus; did"
    " you mean 'jionlp'?"
  )


def test_every_corpus_is_pinned():
  for name, corpus in corpora.CORPORA.items():
    package, _, version = corpus.requirement.partition("==")
    stem = f"{package.replace('-', '_')}-{version}-"
    assert corpus.filename.startswith(stem)
    assert len(bytes.fromhex(corpus.sha256)) == 32
    assert name == corpus.name
    assert corpus.what == f"corpus:{name}"
    assert dataclasses.asdict(corpus)["licence"]
