from __future__ import annotations

import hashlib
import unicodedata
from fractions import Fraction

import numpy as np
import pytest

from aquila_jax.data import cleaning


@pytest.mark.parametrize(
  ("raw", "expected"),
  [
    # Unicode NFC: one letter of two code points, and a singleton.
    ("cafe\u0301", "caf\u00e9"),
    ("\u212bngstr\u00f6m", "\u00c5ngstr\u00f6m"),
    # A character between two that compose is invisible.
    ("cafe\u200b\u0301", "caf\u00e9"),
    # Not NFKC: a ligature and full-width letters are what the author wrote.
    ("\ufb01ne \uff21", "\ufb01ne \uff21"),
    ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh"),
    ("a\u00a0b\u3000c\u2009d\u202fe", "a b c d e"),
    ("\ufeffa\x00b\x07c\u00add\u200be\u2060f\uffffg\x7fh", "abcdefgh"),
    # The joiners of emoji and of Persian stay.
    ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ("می\u200cخواهم", "می\u200cخواهم"),
    ("a  \nb\t \n\n  c", "a\nb\n\n  c"),
    ("a\n\n\n\nb\n \n\t\n\nc", "a\n\nb\n\nc"),
    ("a\n\nb", "a\n\nb"),
    ("\n \t a b\t\n", "a b"),
    ("if x:\n    y\n\tz", "if x:\n    y\n\tz"),
    (" \ufeff\u200b\n", ""),
  ],
)
def test_text_is_cleaned(raw, expected):
  assert cleaning.clean(raw) == expected


def test_clean_text_is_normal_and_stays_as_it_is():
  """Random strings of the characters that the rules are about."""
  alphabet = list(
    "ae\u0301\u0327 \t\n\r\x0b\x85\u200b\u200d\ufeff\u3000한\u1100"
  )
  generator = np.random.default_rng(0)
  for _ in range(500):
    raw = "".join(generator.choice(alphabet, int(generator.integers(0, 30))))
    text = cleaning.clean(raw)
    assert unicodedata.is_normalized("NFC", text), ascii(raw)
    assert cleaning.clean(text) == text, ascii(raw)
    assert not set(text) & set("\r\x0b\x85\u200b\ufeff\u3000"), ascii(raw)
    assert "\n\n\n" not in text and text == text.strip(), ascii(raw)


def test_case_and_spacing_do_not_tell_texts_apart():
  assert cleaning.comparable(" The\n\nSTRASSE\t is  long") == (
    "the strasse is long"
  )
  same = ["The straße.", "the\nSTRASSE.", "  THE   strasse. "]
  assert len({cleaning.fingerprint(text) for text in same}) == 1
  different = ["the strasse", "the strasse.", "thestrasse.", "", "天", "地"]
  prints = {cleaning.fingerprint(text) for text in different}
  assert len(prints) == len(different)
  assert {len(found) for found in prints} == {16}


def test_the_position_is_the_hash_of_the_text_as_a_fraction():
  for text in ("", "天地", "The ground is wet.", *"abcdefghijklmnopqrst"):
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    # Little endian: the last byte is the first digit.
    swapped = "".join(reversed([digest[i : i + 2] for i in range(0, 16, 2)]))
    exact = Fraction(int(swapped, 16), 2**64)
    # Cut to 53 bits, not rounded, so that it is below 1.
    cut_off = exact - Fraction(cleaning.position(text))
    assert 0 <= cut_off < Fraction(1, 2**53)
  # A number that must not change: a split of published data depends on it.
  assert cleaning.position("a") == pytest.approx(0.1846069, abs=1e-6)


def test_positions_are_even():
  found = [cleaning.position(f"text number {i}") for i in range(4000)]
  # 400 expected in each tenth, with a standard deviation of 19.
  counts, _ = np.histogram(found, bins=10, range=(0, 1))
  assert np.all(np.abs(counts - 400) < 4 * 19)
