"""Block sizes, by device and shape; benchmarks/topk_routing_tune.py fills."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib

from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES

# Of a tile: what every phase's arrays fit beside in the smallest VMEM, v5e's.
_MOST_LOGITS = 2**19
_TABLE = pathlib.Path(__file__).with_name("tuned.json")


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
        width -= LANES
      return width

    return Blocks(
      tokens=tokens,
      compare=divisor(self.compare),
      choose=divisor(self.choose),
      sums=divisor(self.sums),
      place=divisor(self.place),
      backward=divisor(self.backward),
    )


@functools.cache
def _table() -> list[dict]:
  return json.loads(_TABLE.read_text(encoding="utf-8"))["rows"]


def blocks(device_kind: str, *, num_experts: int, top_k: int) -> Blocks:
  """Those of the nearest shape that was tuned, on this kind if there is one."""

  def distance(row: dict) -> tuple[bool, float]:
    experts = math.log(row["num_experts"] / num_experts)
    chosen = math.log(row["top_k"] / top_k)
    return row["device_kind"] != device_kind, abs(experts) + abs(chosen)

  found = Blocks(**min(_table(), key=distance)["blocks"])
  # A smaller shape's tile of more experts may not fit in VMEM. A power of two
  # still divides what tiles are wanted of.
  rows = -(-num_experts // SUBLANES) * SUBLANES
  most = 2 ** int(math.log2(_MOST_LOGITS / rows))
  return found.cut(min(found.tokens, most))
