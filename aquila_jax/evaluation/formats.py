"""Numbers as people read them, in the page and on the terminal."""

from __future__ import annotations

import math

# Counts and measurements alike; run-time checks tell int from float.
Number = int | float

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: int) -> str:
  """`10¹²`."""
  return "10" + str(exponent).translate(_SUPERSCRIPT)


def scientific(value: Number) -> str:
  """`9.90 × 10¹²`; plain below 10,000."""
  if not math.isfinite(value):
    return "not finite"
  if abs(value) < 1e4:
    return f"{value:.3g}"
  mantissa, exponent = f"{value:.2e}".split("e")
  return f"{mantissa} × {power_of_ten(int(exponent))}"


def in_words(value: Number) -> str:
  """`1.2M`: three digits and K, M, B or T; below 1,000 the number itself."""
  for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    # What rounds up to the next unit is shown in it.
    if abs(value) >= size * 0.9995:
      scaled = value / size
      digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
      return f"{scaled:.{digits}f}{unit}"
  return f"{value:.3g}"


def duration(seconds: Number) -> str:
  """`45 s`, `7 min 03 s` or `2 h 05 min`."""
  if seconds < 9.95:
    return f"{seconds:.1f} s"
  total = round(seconds)
  if total < 60:
    return f"{total} s"
  if total < 3600:
    return f"{total // 60} min {total % 60:02d} s"
  minutes = round(seconds / 60)
  return f"{minutes // 60:,} h {minutes % 60:02d} min"


def loss(value: Number) -> str:
  """Nats a token, to three decimals."""
  return f"{value:.3f}"


def times(ratio: Number) -> str:
  """`1.31`; two decimals, fewer for large ratios."""
  return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.1f}"


def percent(share: Number) -> str:
  """`12.3%`, with more digits where there would be none."""
  return f"{100 * share:.1f}%" if share >= 0.001 else f"{100 * share:.2g}%"


def signed(difference: Number) -> str:
  """`+0.031` or `−0.031`."""
  return f"{difference:+.3f}".replace("-", "−")
