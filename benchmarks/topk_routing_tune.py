"""Fills kernels/topk_routing/tuned.json: block sizes, by the TPU's schedule.

  python -m benchmarks.topk_routing_tune

needs libtpu (the extra `tpu`) and no TPU. From the default each size in turn
takes the value of the fewest cycles, forward and backward together, until a
round changes nothing. A choice whose loops run out of registers is left out.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from absl import app, flags

from aquila_jax.kernels.topk_routing import tuning
from aquila_jax.kernels.topk_routing.pallas_tpu import PallasTpu
from aquila_jax.kernels.topk_routing.shapes import NAMED, Workload
from aquila_jax.kernels.topk_routing.tuning import Blocks
from aquila_jax.planning.tpu_schedule import Clock
from benchmarks.topk_routing_schedule import TOPOLOGIES, measure

_OUTPUT = flags.DEFINE_string(
  "output",
  str(pathlib.Path(tuning.__file__).with_name("tuned.json")),
  "The JSON file to write.",
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens to tune for.", 128)

_SIZES = {
  "tokens": (512, 1024, 2048, 4096, 8192),
  "compare": (128, 256),
  "choose": (128, 256, 512, 1024),
  "sums": (128, 256, 512, 1024),
  "place": (128, 256, 512, 1024),
  "backward": (128, 256, 512, 1024),
}


def _cycles(clock: Clock, work: Workload, blocks: Blocks) -> int | None:
  """None where it does not compile, or has too few registers."""
  backend = PallasTpu(device_kind=clock.device.device_kind, blocks=blocks)
  try:
    schedule = measure(
      clock, backend, work, num_tokens=_TOKENS.value, backward=True
    )
  except Exception as error:  # whatever the compiler says of memory
    print(f"  {blocks}: {str(error).splitlines()[0][:80]}", flush=True)
    return None
  if any(kernel.spills for kernel in schedule.kernels):
    return None
  assert schedule.is_complete
  return schedule.cycles


def tune(clock: Clock, work: Workload) -> tuple[Blocks, int]:
  """The best sizes found, and their cycles."""
  # Few vectors at a time, which registers will hold.
  best = Blocks(choose=128, sums=128)
  least = _cycles(clock, work, best)
  changed = True
  while changed:
    changed = False
    for field, sizes in _SIZES.items():
      for size in sizes:
        tried = dataclasses.replace(best, **{field: size})
        if tried == best or (field != "tokens" and size > best.tokens):
          continue
        cycles = _cycles(clock, work, tried)
        if cycles is not None and (least is None or cycles < least):
          best, least, changed = tried, cycles, True
  assert least is not None, f"{work}: no sizes without spills"
  return best, least


def main(argv: list[str]) -> None:
  """Tunes all shapes for all kinds of devices; writes after each."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  rows = []
  for topology in TOPOLOGIES:
    clock = Clock(topology)
    for work in NAMED:
      blocks, cycles = tune(clock, work)
      print(f"{clock.device.device_kind} {work}: {blocks} {cycles}", flush=True)
      rows.append(
        dict(
          device_kind=clock.device.device_kind,
          num_experts=work.num_experts,
          top_k=work.top_k,
          blocks=dataclasses.asdict(blocks),
          cycles=cycles,
        )
      )
      text = json.dumps(dict(tokens=_TOKENS.value, rows=rows), indent=2) + "\n"
      pathlib.Path(_OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
