"""Selection on a TPU's vectors: tokens lie on lanes, experts on sublanes.

A vector is [8, W]: eight experts, or the eight best so far, of W tokens. What
is compared are the keys of total_order.py. A key and its expert travel
together; ties go to the lower expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from aquila_jax.kernels.topk_routing.total_order import NO_EXPERT, NO_KEY

SUBLANES = 8
LANES = 128
# In the place of -infinity as a factor: exp of it is 0, and 0 times it is 0.
LEAST = -1e30

Vector = jax.Array  # [8, W]
Ranked = tuple[Vector, Vector]  # keys and experts


def loop(count: int, body: Callable[..., None]) -> None:
  """body(0) to body(count - 1); where there is one, no loop."""
  if count == 1:
    body(0)
    return

  def one(i, carry):
    body(i)
    return carry

  jax.lax.fori_loop(0, count, one, 0)


def part(number, size: int):
  """The slice of that number, of parts of `size`; the number may be traced."""
  if isinstance(number, int):
    return slice(number * size, (number + 1) * size)
  return pl.ds(pl.multiple_of(number * size, size), size)


def sigmoid(x: Vector) -> tuple[Vector, Vector]:
  """And its logarithm, at least LEAST."""
  small = jnp.exp(-jnp.abs(x))
  score = jnp.where(x < 0, small, 1.0) / (1 + small)
  log_score = jnp.minimum(x, 0.0) - jnp.log(1 + small)
  return score, jnp.maximum(log_score, LEAST)


def rows(width: int) -> Vector:
  """The number of every sublane."""
  return jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)


def over_sublanes(
  operation: Callable[[Vector, Vector], Vector], x: Vector
) -> Vector:
  """`x` reduced over its sublanes, the result in each of them."""
  for shift in (4, 2, 1):
    x = operation(x, pltpu.roll(x, shift, 0))
  return x


def take(x: Vector, sublane: Vector) -> Vector:
  """x[sublane[i, w], w]."""
  parts = [
    jnp.take_along_axis(x[:, i : i + LANES], sublane[:, i : i + LANES], axis=0)
    for i in range(0, x.shape[1], LANES)
  ]
  return jnp.concatenate(parts, axis=1)


def lane_sums(x: Vector) -> Float[Array, "8 128"]:
  """Sums over every 128th lane."""
  total = x[:, :LANES]
  for i in range(LANES, x.shape[1], LANES):
    total = total + x[:, i : i + LANES]
  return total


def best_of(columns: Sequence[Ranked]) -> Ranked:
  """The best of several vectors, sublane by sublane; lower experts first."""
  best_key, best_expert = columns[0]
  for key_, expert in columns[1:]:
    better = key_ > best_key
    best_key = jnp.where(better, key_, best_key)
    best_expert = jnp.where(better, expert, best_expert)
  return best_key, best_expert


def sort_columns(columns: Sequence[Ranked], top_k: int) -> list[Ranked]:
  """The first `top_k` of several vectors in falling order, each sublane apart.

  By insertion, which is stable: lower experts come first in `columns`, and stay
  first among equal keys.
  """
  ordered: list[Ranked] = []
  for new_key, new_expert in columns:
    beats = [new_key > key_ for key_, _ in ordered]
    inserted = []
    for j in range(min(len(ordered) + 1, top_k)):
      here = new_key, new_expert
      if j < len(ordered):
        here = _where(beats[j], here, ordered[j])
      if j > 0:
        # Behind one that it beats, everything moves down by one.
        here = _where(beats[j - 1], ordered[j - 1], here)
      inserted.append(here)
    ordered = inserted
  return ordered


def best_sublanes(ordered: Sequence[Ranked], count: int) -> Ranked:
  """The `count` best of sorted columns; the best in sublane 0, and so on.

  Args:
    ordered: of `sort_columns`.
    count: at most 8.

  Returns:
    Keys and experts; in the sublanes from `count` on NO_KEY and 0.
  """
  columns = list(ordered)
  none = jnp.full_like(columns[0][0], NO_KEY)
  nobody = jnp.full_like(none, NO_EXPERT)
  sublane = rows(none.shape[1])
  keys, experts = none, jnp.zeros_like(none)
  for rank in range(count):
    head_key, head_expert = columns[0]
    best = over_sublanes(jnp.maximum, head_key)
    expert = over_sublanes(
      jnp.minimum, jnp.where(head_key == best, head_expert, NO_EXPERT)
    )
    keys = jnp.where(sublane == rank, best, keys)
    experts = jnp.where(sublane == rank, expert, experts)
    # The column that won moves up; what can no longer win is let go.
    left = count - 1 - rank
    won = head_expert == expert
    below = [*columns[1:], (none, nobody)]
    columns = [
      _where(won, below[i], columns[i]) for i in range(min(left, len(columns)))
    ]
  return keys, experts


def _where(condition, one: Ranked, other: Ranked) -> Ranked:
  return (
    jnp.where(condition, one[0], other[0]),
    jnp.where(condition, one[1], other[1]),
  )
