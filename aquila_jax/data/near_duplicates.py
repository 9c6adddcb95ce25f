"""Near duplicates: MinHash signatures, banded buckets, exact verification.

The similarity of two documents is the Jaccard similarity of their sets of
character 5-grams (of `cleaning.comparable` text). Signatures only propose
pairs; whether a pair counts is decided on the sets themselves. After Broder
(1997) and Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
chapter 3.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Int, UInt

from aquila_jax.data import cleaning

_NGRAM = 5  # characters
_NUM_HASHES = 128
_BLOCK = 4096  # n-grams hashed at a time; bounds the memory of long documents
# The least probability that a pair just at the threshold is proposed.
_RECALL = 0.95
# Standard deviations by which an estimate may lie under the threshold.
_SLACK = 4.0


def ngram_hashes(text: str) -> UInt[np.ndarray, " n"]:
  """The 32-bit hashes of a text's character 5-grams, sorted, without repeats.

  A text of fewer characters has one, of the whole.
  """
  raw = cleaning.comparable(text).encode("utf-32-le")
  codes = np.frombuffer(raw, np.uint32).astype(np.uint64)
  width = min(_NGRAM, len(codes))
  if not width:
    return np.zeros(0, np.uint32)
  count = len(codes) - width + 1
  value = np.zeros(count, np.uint64)
  for start in range(width):
    # Unsigned arithmetic wraps: a polynomial in an odd number modulo 2**64.
    value = value * np.uint64(0x9E3779B97F4A7C15) + codes[start : start + count]
  return np.unique(_mixed(value))


def _mixed(value: UInt[np.ndarray, " n"]) -> UInt[np.ndarray, " n"]:
  """The finaliser of MurmurHash3, and its upper half."""
  value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
  value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
  return (value >> np.uint64(32)).astype(np.uint32)


@functools.cache
def _multipliers() -> UInt[np.ndarray, "h 1"]:
  generator = np.random.default_rng(0)
  drawn = generator.integers(0, 2**31, (_NUM_HASHES, 1), np.uint32)
  return drawn * np.uint32(2) + np.uint32(1)


def signature(hashes: UInt[np.ndarray, " n"]) -> UInt[np.ndarray, " h"]:
  """MinHash: two signatures agree in about the share J of their entries."""
  smallest = np.full(_NUM_HASHES, 2**32 - 1, np.uint32)
  for start in range(0, len(hashes), _BLOCK):
    block = hashes[None, start : start + _BLOCK] * _multipliers()
    np.minimum(smallest, block.min(axis=1), out=smallest)
  return smallest


def band_rows(threshold: float) -> int:
  """Signature entries a band: the most that still propose 95% of the pairs."""
  for rows in range(_NUM_HASHES, 1, -1):
    bands = _NUM_HASHES // rows
    if 1 - (1 - threshold**rows) ** bands >= _RECALL:
      return rows
  return 1


def similarity(a: UInt[np.ndarray, " n"], b: UInt[np.ndarray, " m"]) -> float:
  """The Jaccard similarity of two sorted sets of hashes."""
  both = len(np.intersect1d(a, b, assume_unique=True))
  union = len(a) + len(b) - both
  return both / union if union else 1.0


def find(
  texts: Iterable[str], *, threshold: float, text_of: Callable[[int], str]
) -> Bool[np.ndarray, " docs"]:
  """Marks every document that is too similar to an earlier one that is kept.

  Args:
    texts: all documents, read once.
    threshold: Jaccard similarity from which a document is a duplicate.
    text_of: the text of the i-th document, for verification.

  Returns:
    True where the document is a duplicate.
  """
  rows = [signature(ngram_hashes(text)) for text in texts]
  signatures = np.array(rows, np.uint32).reshape(-1, _NUM_HASHES)
  buckets = _shared_buckets(signatures, band_rows(threshold))
  slack = _SLACK * (threshold * (1 - threshold) / _NUM_HASHES) ** 0.5
  duplicate = np.zeros(len(signatures), bool)
  kept: dict[int, list[int]] = defaultdict(list)
  sets = functools.lru_cache(4096)(lambda i: ngram_hashes(text_of(i)))
  for i in sorted(buckets):
    near = sorted({other for bucket in buckets[i] for other in kept[bucket]})
    agreement = (signatures[near] == signatures[i]).mean(axis=1)
    likely = np.asarray(near, np.int64)[agreement >= threshold - slack]
    if any(similarity(sets(i), sets(int(j))) >= threshold for j in likely):
      duplicate[i] = True
      continue
    for bucket in buckets[i]:
      kept[bucket].append(i)
  return duplicate


def _shared_buckets(
  signatures: UInt[np.ndarray, "docs h"], rows: int
) -> dict[int, list[int]]:
  """The buckets that each document shares with another."""
  found: dict[int, list[int]] = defaultdict(list)
  first_free = 0
  for band in range(_NUM_HASHES // rows):
    part = signatures[:, band * rows : (band + 1) * rows]
    numbers, counts = _numbered(part)
    for i in np.flatnonzero(counts[numbers] > 1):
      found[int(i)].append(first_free + int(numbers[i]))
    first_free += len(counts)
  return found


def _numbered(
  part: UInt[np.ndarray, "docs r"],
) -> tuple[Int[np.ndarray, " docs"], Int[np.ndarray, " buckets"]]:
  """Numbers the different rows; the number of each row, and how often it is."""
  key = np.zeros(len(part), np.uint64)
  for column in part.T:
    key = key * np.uint64(0x9E3779B97F4A7C15) + column
  _, numbers, counts = np.unique(key, return_inverse=True, return_counts=True)
  return numbers, counts
