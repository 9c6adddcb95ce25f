"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from aquila_jax.evaluation import formats


@pytest.mark.parametrize(
  ("call", "value", "text"),
  [
    (formats.scientific, 9.904e12, "9.90 × 10¹²"),
    (formats.scientific, 9.996e12, "1.00 × 10¹³"),
    (formats.scientific, 1234.0, "1.23e+03"),
    (formats.scientific, 950.0, "950"),
    (formats.scientific, math.nan, "not finite"),
    (formats.in_words, 104_693_000_000, "105B"),
    (formats.in_words, 1_498_000, "1.50M"),
    (formats.in_words, 14_000_000, "14.0M"),
    (formats.in_words, 999_700, "1.00M"),
    (formats.in_words, 840, "840"),
    (formats.duration, 3.21, "3.2 s"),
    (formats.duration, 45.4, "45 s"),
    (formats.duration, 59.7, "1 min 00 s"),
    (formats.duration, 423, "7 min 03 s"),
    (formats.duration, 3599.6, "1 h 00 min"),
    (formats.duration, 7500, "2 h 05 min"),
    (formats.times, 1.314, "1.31"),
    (formats.times, 12.34, "12.3"),
    (formats.percent, 0.123, "12.3%"),
    (formats.percent, 0.00012, "0.012%"),
    (formats.signed, 0.0312, "+0.031"),
    (formats.signed, -0.0312, "−0.031"),
  ],
)
def test_formats(call, value, text):
  assert call(value) == text
