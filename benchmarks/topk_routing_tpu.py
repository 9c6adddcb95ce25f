"""Claim: routing takes a fraction of XLA's cycles on TPUs, by the schedule.

  python -m benchmarks.topk_routing_tpu --output=benchmarks/results/NAME.json

needs libtpu (the extra `tpu`) and no TPU. The kernel, and the same outputs from
jitted XLA (kernels/topk_routing/reference.py), are compiled for each device,
and the bundles that a core issues are summed (planning/tpu_schedule.py). On v5p
a device has two cores; both sides are of one, with half of the work.

Layouts of arguments and results are the compiler's choice, as in a model.
`spills` are registers that the kernel moved to memory in its loops. Where the
trips of a loop are not in the code, it counts once, and the row says so.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from absl import app, flags

from aquila_jax.kernels.topk_routing.pallas_tpu import PallasTpu
from aquila_jax.kernels.topk_routing.reference import Xla
from aquila_jax.kernels.topk_routing.shapes import NAMED, Workload
from aquila_jax.planning.tpu_schedule import Clock
from benchmarks import gpu_clock
from benchmarks.topk_routing_schedule import TOPOLOGIES, measure

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_TOKENS = flags.DEFINE_multi_integer("tokens", [8192, 32768], "Tokens.", 128)


def _row(
  clock: Clock, work: Workload, *, num_tokens: int, backward: bool
) -> dict[str, Any]:
  kind = clock.device.device_kind
  found = {
    name: measure(
      clock, backend, work, num_tokens=num_tokens, backward=backward
    )
    for name, backend in (
      ("kernel", PallasTpu(device_kind=kind)),
      ("xla", Xla()),
    )
  }
  kernel, xla = found["kernel"], found["xla"]
  return dict(
    device=kind,
    num_experts=work.num_experts,
    top_k=work.top_k,
    num_tokens=num_tokens,
    direction="forward+backward" if backward else "forward",
    kernel_cycles=kernel.cycles,
    xla_cycles=xla.cycles,
    ratio=float(f"{kernel.cycles / xla.cycles:.3g}"),
    spills=sum(k.spills for k in kernel.kernels if "topk" in k.name),
    kernel_parts={k.name: k.cycles for k in kernel.kernels},
    xla_parts={k.name: k.cycles for k in xla.kernels},
    counted_once={
      name: [
        dict(part=k.name, loops=[[loop.start, loop.end] for loop in loops])
        for k in schedule.kernels
        if (loops := k.unknown_loops)
      ]
      for name, schedule in found.items()
      if not schedule.is_complete
    },
  )


_HEADER = (
  f"{'device':<12}{'experts':>9}{'tokens':>8}  {'direction':<18}"
  f"{'kernel':>9}{'XLA':>10}{'ratio':>8}{'spills':>8}"
)


def _line(row: dict[str, Any]) -> str:
  shape = f"{row['num_experts']}/{row['top_k']}"
  sides = " and ".join(row["counted_once"])
  once = f"  (loops of {sides} counted once)" if sides else ""
  return (
    f"{row['device']:<12}{shape:>9}{row['num_tokens']:>8}"
    f"  {row['direction']:<18}{row['kernel_cycles']:>9}{row['xla_cycles']:>10}"
    f"{row['ratio']:>8.3f}{row['spills']:>8}{once}"
  )


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  rows = []
  print(_HEADER, flush=True)
  for topology in TOPOLOGIES:
    clock = Clock(topology)
    for num_tokens in _TOKENS.value:
      for work in NAMED:
        for backward in (False, True):
          row = _row(clock, work, num_tokens=num_tokens, backward=backward)
          rows.append(row)
          print(_line(row), flush=True)
  gpu_clock.write_report(
    _OUTPUT.value,
    benchmark="topk_routing_tpu",
    libtpu=importlib.metadata.version("libtpu"),
    rows=rows,
  )


if __name__ == "__main__":
  app.run(main)
