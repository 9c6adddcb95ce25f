"""Block sizes, by device and shape; benchmarks/topk_routing_tune.py fills."""

from __future__ import annotations

import dataclasses

_LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """How many tokens a tile has, and a loop of each phase; multiples of 128."""

  tokens: int = 512
  compare: int = 128
  choose: int = 256
  sums: int = 256
  place: int = 128
  backward: int = 128

  def cut(self, tokens: int) -> Blocks:
    """With tiles of so many tokens, and loops that divide them."""

    def divisor(width: int) -> int:
      width = min(width, tokens)
      while tokens % width:
        width -= _LANES
      return width

    return Blocks(
      tokens=tokens,
      compare=divisor(self.compare),
      choose=divisor(self.choose),
      sums=divisor(self.sums),
      place=divisor(self.place),
      backward=divisor(self.backward),
    )


def blocks(device_kind: str, *, num_experts: int, top_k: int) -> Blocks:
  """Those of the nearest shape that was tuned."""
  del device_kind, num_experts, top_k
  return Blocks()


def num_cores(device_kind: str) -> int:
  """Cores that one device of JAX consists of."""
  return 2 if device_kind in ("TPU v4", "TPU v5", "TPU v5p") else 1
