"""How often which tokens met which experts, summed over batches.

What is kept does not grow with the text: sums a layer, and for each layer the
pairs of a token and an expert that occurred, as a sorted list. A table of all
tokens by all experts would be mostly zeros, and of 48 layers, 150,000 tokens
and 64 experts 1.8 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from aquila_jax.core.types import Batch, RoutingStats

_PENDING = 2**20  # entries that wait to be merged


class TokenExperts:
  """Of one layer, how often each token met each expert.

  Args:
    num_experts: E.
  """

  def __init__(self, num_experts: int):
    self._num_experts = num_experts
    # Keys are token * E + expert. The first arrays are sorted and merged.
    self._keys = [np.zeros(0, np.int64)]
    self._counts = [np.zeros(0, np.int64)]
    self._pending = 0

  def add(
    self, tokens: Int[np.ndarray, "M"], ids: Int[np.ndarray, "M A"]
  ) -> None:
    """Counts M tokens and the experts that each met; -1 is none."""
    first = tokens.astype(np.int64)[:, None] * self._num_experts
    keys, counts = np.unique((first + ids)[ids >= 0], return_counts=True)
    self._keys.append(keys)
    self._counts.append(counts.astype(np.int64))
    self._pending += len(keys)
    if self._pending > max(_PENDING, len(self._keys[0])):
      self._merge()

  def _merge(self) -> None:
    keys, place = np.unique(np.concatenate(self._keys), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, place, np.concatenate(self._counts))
    self._keys, self._counts, self._pending = [keys], [counts], 0

  def entries(
    self,
  ) -> tuple[
    Int[np.ndarray, "entries"],
    Int[np.ndarray, "entries"],
    Int[np.ndarray, "entries"],
  ]:
    """Token, expert and count of every pair that occurred, in that order."""
    self._merge()
    tokens, experts = np.divmod(self._keys[0], self._num_experts)
    return tokens, experts, self._counts[0]


class RoutingCounts:
  """All that is counted while a text is read. L layers have experts.

  Args:
    layers: their numbers in the model.
    num_experts: E.
    num_domains: K; a batch's `languages` are below it.
    vocab_size: V.
    capacity_factor: slots of an expert over its even share of a batch, of
      which is counted what more would come; None is no limit.
  """

  def __init__(
    self,
    layers: Sequence[int],
    *,
    num_experts: int,
    num_domains: int,
    vocab_size: int,
    capacity_factor: float | None = None,
  ):
    self.layers = tuple(layers)
    self.num_experts = num_experts
    self.capacity_factor = capacity_factor
    size = len(self.layers)
    # int [V]; how often a token occurred.
    self.occurrences = np.zeros(vocab_size, np.int64)
    # int [K]; tokens of a domain.
    self.domain_tokens = np.zeros(num_domains, np.int64)
    # int [L K E]; assignments.
    self.load = np.zeros((size, num_domains, num_experts), np.int64)
    # int [L E E]; tokens that met both, on the diagonal those that met one.
    self.together = np.zeros((size, num_experts, num_experts), np.int64)
    self.token_experts = [TokenExperts(num_experts) for _ in self.layers]
    # By field of RoutingStats, float [L]; sums of the means times tokens.
    self._sums = {
      name: np.zeros(size) for name in ("entropy", "top_gate", "z_loss")
    }
    self._sums |= {name: np.zeros(size) for name in ("dropped", "over")}

  @property
  def num_tokens(self) -> int:
    return int(self.domain_tokens.sum())

  def add(
    self, batch: Batch, ids: Int[np.ndarray, "L B T A"], stats: RoutingStats
  ) -> None:
    """Counts a batch; its padding is left out.

    Args:
      batch: of NumPy arrays.
      ids: the experts that each token met in each layer; -1 is none.
      stats: of the same pass, NumPy arrays [L ...].
    """
    real = np.asarray(batch.segments) > 0
    tokens = np.asarray(batch.tokens)[real].astype(np.int64)
    domains = np.asarray(batch.languages)[real].astype(np.int64)
    num_domains = len(self.domain_tokens)
    self.occurrences += np.bincount(tokens, minlength=len(self.occurrences))
    self.domain_tokens += np.bincount(domains, minlength=num_domains)
    for row, of_layer in enumerate(ids):
      met = of_layer[real]  # (B, T, A) -> (M, A)
      self.token_experts[row].add(tokens, met)
      self.load[row] += self._by_domain(domains, met)
      self.together[row] += self._both(met)
    self._add_stats(stats, weight=len(tokens))

  def _by_domain(
    self, domains: Int[np.ndarray, "M"], met: Int[np.ndarray, "M A"]
  ) -> Int[np.ndarray, "K E"]:
    shape = self.load.shape[1:]
    keys = domains[:, None] * self.num_experts + met
    counts = np.bincount(keys[met >= 0], minlength=shape[0] * shape[1])
    return counts.reshape(shape)

  def _both(self, met: Int[np.ndarray, "M A"]) -> Int[np.ndarray, "E E"]:
    # The last column takes the place of "none". Counts up to 2^24 are exact in
    # float32, and a batch has fewer tokens.
    assigned = np.zeros((len(met), self.num_experts + 1), np.float32)
    np.put_along_axis(assigned, met % (self.num_experts + 1), 1.0, axis=1)
    assigned = assigned[:, :-1]
    return np.rint(assigned.T @ assigned).astype(np.int64)

  def _add_stats(self, stats: RoutingStats, *, weight: int) -> None:
    for name in ("entropy", "top_gate", "z_loss", "dropped"):
      self._sums[name] += weight * np.asarray(getattr(stats, name), np.float64)
    if self.capacity_factor is not None:
      load = np.asarray(stats.load, np.float64)
      slots = self.capacity_factor / self.num_experts
      self._sums["over"] += weight * np.maximum(load - slots, 0).sum(-1)

  def mean(self, name: str) -> Float[np.ndarray, "L"]:
    """The mean over tokens of a field of RoutingStats.

    Args:
      name: entropy, top_gate, z_loss or dropped; `over` is the share of the
        assignments that `capacity_factor` leaves no slot for, batch by batch.
    """
    return self._sums[name] / max(self.num_tokens, 1)
