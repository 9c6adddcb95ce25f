from __future__ import annotations

import numpy as np
import pytest

from aquila_jax.data import near_duplicates

_LETTERS = list("abcdefghij 天地玄黄")


def _grams(text: str) -> set[str]:
  """The 5-grams of a text in lower case with single spaces."""
  text = " ".join(text.lower().split())
  return {text[i : i + 5] for i in range(max(len(text) - 4, min(len(text), 1)))}


def _jaccard(a: str, b: str) -> float:
  first, second = _grams(a), _grams(b)
  if not first | second:
    return 1.0
  return len(first & second) / len(first | second)


def _brute_force(texts: list[str], threshold: float) -> list[bool]:
  """A text is dropped where it is too similar to one that was kept before."""
  kept: list[str] = []
  dropped = []
  for text in texts:
    near = any(_jaccard(text, other) >= threshold for other in kept)
    dropped.append(near)
    if not near:
      kept.append(text)
  return dropped


def _find(texts: list[str], threshold: float) -> list[bool]:
  found = near_duplicates.find(
    iter(texts), threshold=threshold, text_of=texts.__getitem__
  )
  assert len(found) == len(texts)
  return found.tolist()


def _random_text(generator: np.random.Generator, length: int) -> str:
  return "".join(generator.choice(_LETTERS, length))


def _changed(generator: np.random.Generator, text: str, number: int) -> str:
  letters = list(text)
  for place in generator.choice(len(text), number, replace=False):
    letters[place] = generator.choice(_LETTERS)
  return "".join(letters)


@pytest.mark.parametrize(
  "text", ["", "a", "abcd", "abcde", "abcdef", "abababababab", "The  天地\nthe"]
)
def test_a_document_is_the_set_of_its_five_grams(text):
  hashes = near_duplicates.ngram_hashes(text)
  assert len(hashes) == len(_grams(text))
  assert np.all(np.diff(hashes.astype(np.int64)) > 0)


def test_similarity_is_jaccards():
  generator = np.random.default_rng(0)
  for changes in (0, 1, 3, 8, 20):
    text = _random_text(generator, 100)
    other = _changed(generator, text, changes)
    found = near_duplicates.similarity(
      near_duplicates.ngram_hashes(text), near_duplicates.ngram_hashes(other)
    )
    assert found == _jaccard(text, other)
  # 5-grams abcde bcdef and bcdef cdefg: one of three is in both.
  abc, bcd = map(near_duplicates.ngram_hashes, ("abcdef", "bcdefg"))
  assert near_duplicates.similarity(abc, bcd) == 1 / 3
  nothing = near_duplicates.ngram_hashes("")
  assert near_duplicates.similarity(nothing, nothing) == 1
  assert near_duplicates.similarity(nothing, abc) == 0


def test_signatures_estimate_the_similarity():
  """The mean of 200 estimates, each of standard deviation below 0.05."""
  generator = np.random.default_rng(1)
  differences = []
  for _ in range(200):
    text = _random_text(generator, 300)
    other = _changed(generator, text, int(generator.integers(1, 40)))
    a, b = (
      near_duplicates.signature(near_duplicates.ngram_hashes(t))
      for t in (text, other)
    )
    differences.append((a == b).mean() - _jaccard(text, other))
  assert abs(np.mean(differences)) < 4 * 0.05 / 200**0.5
  assert np.std(differences) < 0.05


def test_a_signature_does_not_depend_on_how_it_is_made_in_blocks(monkeypatch):
  hashes = near_duplicates.ngram_hashes(
    _random_text(np.random.default_rng(2), 300)
  )
  whole = near_duplicates.signature(hashes)
  monkeypatch.setattr(near_duplicates, "_BLOCK", 7)
  assert near_duplicates.signature(hashes).tolist() == whole.tolist()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_propose_95_percent_of_the_pairs_at_the_threshold(threshold):
  rows = near_duplicates.band_rows(threshold)

  def proposed(rows: int) -> float:
    return 1 - (1 - threshold**rows) ** (128 // rows)

  assert proposed(rows) >= 0.95
  # More rows a band propose fewer pairs to verify, but lose too many.
  assert proposed(rows + 1) < 0.95


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_pairs_around_the_threshold_are_those_of_brute_force(threshold):
  """300 pairs, most within 0.15 of the threshold; no two pairs are alike.

  No pair below the threshold may be found. Of those above, signatures do not
  propose 5% at the threshold and ever fewer beyond.
  """
  generator = np.random.default_rng(3)
  texts = []
  for _ in range(300):
    text = _random_text(generator, int(generator.integers(60, 250)))
    # A change spoils 5 of n grams on both sides: J = (n - 5k) / (n + 5k).
    changes = len(text) / 5 * (1 - threshold) / (1 + threshold)
    changes = round(changes * generator.uniform(0.6, 1.5))
    texts += [text, _changed(generator, text, max(changes, 1))]
  similar = np.array(
    [_jaccard(*texts[i : i + 2]) for i in range(0, len(texts), 2)]
  )
  expected = np.array(_brute_force_pairs(similar, threshold))
  assert 80 < expected[1::2].sum() < 220
  found = np.array(_find(texts, threshold))
  assert not np.any(found & ~expected)
  missed = expected & ~found
  assert missed.sum() <= 0.05 * expected.sum()
  # 0.1 above the threshold one pair in 5,000 would be missed.
  assert not missed[1::2][similar >= threshold + 0.1].any()


def _brute_force_pairs(similar: np.ndarray, threshold: float) -> list[bool]:
  """Of each pair the second is dropped, if it is similar enough."""
  return [drop for value in similar for drop in (False, value >= threshold)]


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_near_duplicates_are_those_of_brute_force(seed):
  """Clusters whose members are far above or below the threshold."""
  generator = np.random.default_rng(seed)
  texts = []
  for _ in range(12):
    text = _random_text(generator, 150)
    texts += [text, *(_changed(generator, text, 1) for _ in range(3))]
    texts.append(_changed(generator, text, 25))
  texts = [str(text) for text in generator.permutation(np.array(texts))]
  expected = _brute_force(texts, 0.8)
  # 12 texts and 12 that were changed much are left.
  assert expected.count(False) == 24
  assert _find(texts, 0.8) == expected


def test_a_copy_of_what_was_dropped_is_compared_with_what_was_kept():
  """A ~ B ~ C, but not A ~ C: B is dropped, and C stays."""
  a = "0123456789abcdefghijklmnopqrstuvwxyz" * 2
  letters = "!ABCDEFGHIJKLMNOPQRSTUVWXYZ".lower()[::-1]
  b = a[:72] + letters[:5]
  c = b + letters[5:12]
  texts = [a, b, c]
  threshold = 0.85
  similar = [_jaccard(a, b), _jaccard(b, c), _jaccard(a, c)]
  assert [value >= threshold for value in similar] == [True, True, False]
  assert _find(texts, threshold) == [False, True, False]


def test_case_and_spacing_do_not_hide_a_copy():
  text = "The ground is wet because it rained in the night."
  copies = [text, text.upper().replace(" ", "\n  "), "天地玄黄宇宙洪荒日月盈昃"]
  assert _find(copies, 0.9) == [False, True, False]


def test_short_texts_are_compared_whole():
  texts = ["abc", "abd", "ABC", "", "abcdefgh", ""]
  assert _find(texts, 0.5) == [False, False, True, False, False, True]


@pytest.mark.parametrize("texts", [[], ["one text"]])
def test_too_few_texts_have_no_duplicates(texts):
  assert _find(texts, 0.8) == [False] * len(texts)
