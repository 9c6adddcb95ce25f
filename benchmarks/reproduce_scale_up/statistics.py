"""What is to be seen in the initial losses and in the curves."""

from __future__ import annotations

from typing import Any

from benchmarks.reproduction.statistics import Curve, Results, Spread, spread


def initial(results: Results, size: str, method: str) -> list[dict[str, Any]]:
  """The rows of one size and method, a seed each."""
  return [
    row
    for seed in results["seeds"].values()
    for row in seed["initial"]
    if (row["size"], row["method"]) == (size, method)
  ]


def initial_loss(results: Results, size: str, method: str) -> Spread | None:
  rows = initial(results, size, method)
  return spread([row["loss"] for row in rows])


def overtaken_at(arm: Curve, other: Curve) -> float | None:
  """From which validation on the loss of `arm` is below that of `other`.

  Args:
    arm: tokens and loss.
    other: at the same numbers of tokens.

  Returns:
    Tokens at the first validation from which on it stays below; None where it
    is not below at the last.
  """
  below = None
  for (tokens, loss), (_, others) in zip(arm, other, strict=True):
    if loss >= others:
      below = None
    elif below is None:
      below = tokens
  return below
