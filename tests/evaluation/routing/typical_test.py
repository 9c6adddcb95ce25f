from __future__ import annotations

from aquila_jax.evaluation.routing.typical import TypicalToken, typical_tokens
from tests.evaluation.routing import tiny_moe

# 4 times token 0 at expert 0; token 1 at 1, 1, 1, 0; token 2 once at 1; token 3
# twice at 0. P(expert 0) = 7 / 11, P(expert 1) = 4 / 11.
TOKENS = [0] * 4 + [1] * 4 + [2] + [3] * 2
EXPERTS = [[0]] * 4 + [[1]] * 3 + [[0]] + [[1]] + [[0]] * 2


def test_the_highest_lift_comes_first_and_frequent_tokens_among_equals():
  found = typical_tokens(
    tiny_moe.counted(TOKENS, EXPERTS), 0, min_count=2, limit=5
  )
  assert found == [
    [
      TypicalToken(token=0, count=4, share=1.0, lift=11 / 7),
      TypicalToken(token=3, count=2, share=1.0, lift=11 / 7),
    ],
    [TypicalToken(token=1, count=4, share=0.75, lift=0.75 / (4 / 11))],
    [],
  ]


def test_rare_tokens_count_where_they_are_asked_for_and_few_are_kept():
  counts = tiny_moe.counted(TOKENS, EXPERTS)
  found = typical_tokens(counts, 0, min_count=1, limit=1)
  assert [[t.token for t in expert] for expert in found] == [[0], [2], []]


def test_with_two_experts_a_token_shares_are_of_occurrences():
  """Token 0 always meets expert 0, which all tokens meet: lift 1, no sign."""
  counts = tiny_moe.counted([0, 0, 1, 1], [[0, 1], [0, 1], [0, 2], [0, 2]])
  found = typical_tokens(counts, 0, min_count=1, limit=5)
  assert found == [
    [],
    [TypicalToken(token=0, count=2, share=1.0, lift=2.0)],
    [TypicalToken(token=1, count=2, share=1.0, lift=2.0)],
  ]
