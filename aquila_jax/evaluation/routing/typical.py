"""The tokens that an expert meets far more often than it meets others."""

from __future__ import annotations

import dataclasses

import numpy as np

from aquila_jax.evaluation.routing.counts import RoutingCounts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TypicalToken:
  """A token and one of the experts that it meets."""

  token: int
  count: int  # how often it occurred
  share: float  # P(expert | token): how often of these it met the expert
  lift: float  # that over P(expert)


def typical_tokens(
  counts: RoutingCounts, row: int, *, min_count: int, limit: int
) -> list[list[TypicalToken]]:
  """Of every expert of a layer, the tokens with the highest lift.

  P(expert | token) is the share of the token's occurrences that met the expert,
  P(expert) that of all tokens. Equal lifts, such as those of tokens that met an
  expert always, are ordered by how often the token occurred.

  Args:
    counts: of the text.
    row: of the layer, among those with experts.
    min_count: the least occurrences of a token.
    limit: the most tokens of an expert.

  Returns:
    For each of E experts at most `limit` tokens, all of a lift above 1.
  """
  tokens, experts, met = counts.token_experts[row].entries()
  occurred = counts.occurrences[tokens]
  load = counts.load[row].sum(0) / max(counts.num_tokens, 1)
  share = met / np.maximum(occurred, 1)
  lift = share / load[experts]
  kept = np.flatnonzero((occurred >= min_count) & (lift > 1))
  # The last key is the first to be sorted by.
  order = kept[np.lexsort((tokens[kept], -occurred[kept], -lift[kept]))]
  found: list[list[TypicalToken]] = [[] for _ in range(counts.num_experts)]
  for i in order:
    of_expert = found[experts[i]]
    if len(of_expert) < limit:
      of_expert.append(
        TypicalToken(
          token=int(tokens[i]),
          count=int(occurred[i]),
          share=float(share[i]),
          lift=float(lift[i]),
        )
      )
  return found
