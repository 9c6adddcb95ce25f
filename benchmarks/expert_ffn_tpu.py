"""Claim: on TPUs our kernels are the fast way to run experts, by the schedule.

  python -m benchmarks.expert_ffn_tpu --output=benchmarks/results/NAME.json

needs libtpu (the extra `tpu`) and no TPU; broken off, it goes on with the rows
that the file has. Experts of a dropless dispatch with a
skewed choice, and one dense FFN of as many rows, are compiled for each device,
in bfloat16, forward and forward with backward. A kernel's cycles are

  max(bundles, 4 * matrix instructions)

with what stands in a branch counted as often as the branch is taken for these
loads. Four, because a v5p core takes 16 cycles for such an instruction in each
of 4 units, and v6e 8 in each of 2, by their published rates at 1.75 GHz; the
schedule alone would exceed that of v5p. `mfu` is of the published rate and of
the FLOPs of the routed rows only, so that padding costs whoever pads. Waiting
for memory is not in the cycles: `hbm_ms` is the least time of the bytes that
the kernels say they move, at the published bandwidth. For ours, which state
what they move tile by tile, `roofline_ms` sums the larger of the two times of
each kernel.

Dispatch and combine are not in it. megablox is jax's own; its tiles are the
best of a few by this measure. Neither its grid nor that of `ragged_dot` is in
the code: steps are those of the loads, and for `ragged_dot`, whose branches are
not known, its FLOPs over those of a step, with all of its branches.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from aquila_jax.kernels.expert_ffn import pallas_tpu, ragged, swiglu
from aquila_jax.kernels.target import num_cores
from aquila_jax.planning.tpu_program import Chip
from aquila_jax.planning.tpu_schedule import (
  PRODUCT_CYCLES,
  Branch,
  Clock,
  Kernel,
  Schedule,
)
from benchmarks import gpu_clock

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_ONLY = flags.DEFINE_multi_string("only", [], "Implementations; none is all.")

TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2")
_PRODUCT_FLOPS = {"TPU v5": 2 * 16 * 128**2, "TPU v6 lite": 2 * 16 * 256**2}
# Branches of fewer bundles start copies, or wait for them.
_SMALL = 40
_CALL = re.compile(
  r"\s*(?:ROOT )?%(?P<name>\S+) = (?P<result>.*?) custom-call\(.*"
  r'custom_call_target="tpu_custom_call",'
  r" operand_layout_constraints=(?P<operands>\{.*?\}\})"
)
_MOVED = re.compile(
  r"\s*(?:ROOT )?%(?P<name>\S+) = .*tpu_custom_call.*"
  r'"bytes_accessed":"(?P<bytes>\d+)"'
)
# Of megablox's tiles; the best of those tried by this measure.
_MEGABLOX_ROWS = 512
_MEGABLOX_DEPTHS = 4  # into which 5632 is cut, so that a tile fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """One layer's experts and the tokens of one step."""

  name: str
  num_experts: int  # E
  top_k: int  # A
  mlp_dim: int  # F
  block_size: int  # Q
  num_tokens: int = 16384  # M
  embed_dim: int = 2048  # D

  @property
  def num_rows(self) -> int:
    """R, without padding."""
    return self.num_tokens * self.top_k

  @property
  def flops(self) -> float:
    """Of a forward pass."""
    return 6.0 * self.num_rows * self.embed_dim * self.mlp_dim

  @property
  def num_blocks(self) -> int:
    """P, enough for any choice."""
    size = self.block_size
    return (self.num_rows + self.num_experts * (size - 1)) // size

  @property
  def loads(self) -> np.ndarray:
    """Rows of each expert, padded: the busiest has about 1.4 of the mean."""
    weights = np.linspace(0.6, 1.4, self.num_experts)
    counts = np.floor(weights * self.num_rows / weights.sum()).astype(int)
    counts[-1] += self.num_rows - counts.sum()
    return -(-counts // self.block_size) * self.block_size


WORKLOADS = (
  Workload(
    name="8 of 5632", num_experts=8, top_k=2, mlp_dim=5632, block_size=256
  ),
  Workload(
    name="64 of 704", num_experts=64, top_k=8, mlp_dim=704, block_size=256
  ),
  Workload(
    name="64 of 704", num_experts=64, top_k=8, mlp_dim=704, block_size=64
  ),
  # A device's of AquilaMoE-8x16B on two: a core holds but few of 20,480.
  Workload(
    name="4 of 20480",
    num_experts=4,
    top_k=2,
    mlp_dim=20480,
    block_size=256,
    embed_dim=5120,
  ),
)
Row = dict[str, Any]


def _pallas_tpu(work: Workload, kind: str) -> Callable:
  del work
  return functools.partial(pallas_tpu.expert_ffn, device_kind=kind)


def _megablox(work: Workload, kind: str) -> Callable:
  """Three of megablox's products and their gradients."""
  del kind

  def tiles(m, k, n):
    del m
    depth = k // _MEGABLOX_DEPTHS if k > 2048 else k
    columns = 384 if n < 1024 else 512 if depth > 1024 else 1024
    return _MEGABLOX_ROWS, depth, 1024 if k > 2048 else columns

  def outer_tiles(m, k, n):
    del m
    return _MEGABLOX_ROWS, min(k, 1024), 384 if n < 1024 else 1024

  @jax.custom_vjp
  def product(x, kernel, sizes):
    return gmm(x, kernel, sizes, x.dtype, tiles)

  def forward(x, kernel, sizes):
    return product(x, kernel, sizes), (x, kernel, sizes)

  def backward(residuals, grad):
    x, kernel, sizes = residuals
    dx = gmm(grad, kernel, sizes, x.dtype, tiles, transpose_rhs=True)
    dkernel = tgmm(x.T, grad, sizes, kernel.dtype, outer_tiles)
    return dx, dkernel, None

  product.defvjp(forward, backward)

  def call(rows, kernels, *, block_expert, num_blocks):
    gate, up, down = kernels
    sizes = work.block_size * swiglu.blocks_of_experts(
      block_expert, num_blocks, num_experts=work.num_experts
    )
    x = rows.reshape(-1, work.embed_dim)
    spare = -len(x) % _MEGABLOX_ROWS
    x = jnp.pad(x, ((0, spare), (0, 0)))
    hidden = jax.nn.silu(product(x, gate, sizes)) * product(x, up, sizes)
    out = product(hidden, down, sizes)[: rows.shape[0] * rows.shape[1]]
    used = swiglu.in_use(block_expert, num_blocks)
    out = out.reshape(rows.shape)
    return jnp.where(used[:, None, None], out, jnp.zeros((), out.dtype))

  return call


def _ragged_dot(work: Workload, kind: str) -> Callable:
  del work, kind
  return ragged.expert_ffn


def _dense(work: Workload, kind: str) -> Callable:
  del kind

  def call(rows, kernels, *, block_expert, num_blocks):
    del block_expert, num_blocks
    gate, up, down = (kernel[0] for kernel in kernels)
    x = rows.reshape(-1, work.embed_dim)
    return ((jax.nn.silu(x @ gate) * (x @ up)) @ down).reshape(rows.shape)

  return call


IMPLEMENTATIONS = {
  "pallas_tpu": _pallas_tpu,
  "megablox": _megablox,
  "ragged_dot": _ragged_dot,
  "one dense FFN": _dense,
}


def compiled(
  clock: Clock, work: Workload, implementation: str, *, backward: bool
) -> Schedule:
  """Experts, with the gradients of rows and kernels or without."""
  kind = clock.device.device_kind
  call = IMPLEMENTATIONS[implementation](work, kind)
  is_dense = implementation == "one dense FFN"
  experts = 1 if is_dense else work.num_experts
  size, width, hidden = work.block_size, work.embed_dim, work.mlp_dim
  blocks = work.num_rows // size if is_dense else work.num_blocks

  def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  rows = array(blocks, size, width)
  into = array(experts, width, hidden)
  kernels = (into, into, array(experts, hidden, width))
  choice = (
    jax.ShapeDtypeStruct((blocks,), jnp.int32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )

  def forward(rows, kernels, expert, used):
    return call(rows, kernels, block_expert=expert, num_blocks=used)

  def both(rows, kernels, expert, used, grad):
    out, pull = jax.vjp(
      lambda rows, kernels: forward(rows, kernels, expert, used), rows, kernels
    )
    return out, pull(grad)

  if backward:
    return clock.measure(both, rows, kernels, *choice, rows)
  return clock.measure(forward, rows, kernels, *choice)


def _visits(loads: np.ndarray, tile: int) -> list[tuple[int, int]]:
  """The rows [first, end) that are taken, of tiles once for each expert."""
  found, start = [], 0
  for load in loads.tolist():
    stop = start + load
    for row in range(start // tile * tile, stop, tile) if load else ():
      found.append((max(start - row, 0), min(stop - row, tile)))
    start = stop
  return found


def _bytes(schedule: Schedule) -> dict[str, int]:
  """What Pallas kernels say they move."""
  assert schedule.compiled is not None
  text = schedule.compiled.as_text() or ""
  found = (_MOVED.search(line) for line in text.splitlines())
  return {moved["name"]: int(moved["bytes"]) for moved in found if moved}


def _calls(schedule: Schedule) -> dict[str, float]:
  """Kernel -> how often it is called: what is the same is compiled once."""
  assert schedule.compiled is not None
  found: dict[Any, list[str]] = {}
  for line in (schedule.compiled.as_text() or "").splitlines():
    if (call := _CALL.match(line)) is not None:
      found.setdefault(call.group("result", "operands"), []).append(
        call["name"]
      )
  calls = {}
  names = {kernel.name for kernel in schedule.kernels}
  for alike in found.values():
    compiled_once = [name for name in alike if name in names]
    for name in compiled_once:
      calls[name] = len(alike) / len(compiled_once)
  return calls


def _times(kernel: Kernel, work: Workload, columns: float) -> dict[Branch, Any]:
  """How often branches are taken, for a tile of columns or a part of sums."""
  computing = kernel.computing
  large = [b for b in kernel.branches if b.bundles > _SMALL]
  before = [b for b in large if b.end <= computing[0].start]
  behind = [b for b in large if b.start >= computing[-1].end]
  experts, loads = work.num_experts, work.loads
  name, rows = kernel.name, work.num_blocks * work.block_size
  if "tgmm" in name:
    visits = len(_visits(loads, _MEGABLOX_ROWS))
    return {before[-1]: experts, computing[0]: visits, behind[0]: experts}
  if "expert_" not in name:
    raise ValueError(f"{name}: not a kernel whose branches are known")
  tile, part = pallas_tpu.tile_rows_of(kernel.name)
  visits = _visits(loads, tile)
  parts = [visit for visit in visits if visit != (0, tile)]
  unused = -(-rows // tile) - -(-int(loads.sum()) // tile)
  if len(computing) == 1:
    aside = {before[-2]: unused, before[-1]: len(parts), behind[0]: len(parts)}
    return aside | {computing[0]: len(visits)}
  taken = [len(visits) - len(parts)]
  for start in range(0, tile, part):
    taken.append(
      sum(first < start + part and end > start for first, end in parts)
    )
  if pallas_tpu.DEEP in name:
    # Begun and written once for all parts of a sum.
    written = unused, taken[0], len(parts)
    edges = {b: n / columns for b, n in zip(behind, written, strict=True)}
    edges[before[-1]] = len(visits) / columns
  else:
    edges = {before[-1]: experts, behind[0]: experts}
  return edges | dict(zip(computing, taken, strict=True))


def _cycles(
  kernel: Kernel, work: Workload, kind: str, *, flops: float | None = None
) -> tuple[float, int]:
  """(cycles, matrix instructions) with these loads."""
  grid = [loop for loop in kernel.loops if loop.depth == 1]
  weight = np.ones(len(kernel.products))
  if not any(kernel.products) or not grid:
    return float(kernel.cycles), 0
  loop = grid[0]
  products = np.asarray(kernel.products)
  if "expert_" in kernel.name:
    tile, _ = pallas_tpu.tile_rows_of(kernel.name)
    rows = work.num_blocks * work.block_size
    steps = -(-rows // tile) + work.num_experts
    columns = (loop.trips or 1) / steps
    weight[loop.start : loop.end] = loop.trips or 1
    for branch, times in _times(kernel, work, columns).items():
      weight[branch.start : branch.end] = times * columns
  elif "tgmm" in kernel.name:
    visits = len(_visits(work.loads, _MEGABLOX_ROWS))
    weight[loop.start : loop.end] = visits * loop.known_trips
    for branch, times in _times(kernel, work, loop.known_trips).items():
      weight[branch.start : branch.end] = times * loop.known_trips
  elif "gmm" in kernel.name:
    visits = len(_visits(work.loads, _MEGABLOX_ROWS))
    weight[loop.start : loop.end] = visits * loop.known_trips
    computing = sorted(kernel.computing, key=lambda branch: branch.bundles)
    if len(computing) > 1:  # the larger one, of the last depth, also stores
      last = 1 / _MEGABLOX_DEPTHS
      for branch, share in zip(computing, (1 - last, last), strict=True):
        weight[branch.start : branch.end] *= share
  elif loop.trips is None:
    per_step = int(products[loop.start : loop.end].sum())
    steps = (flops or 0.0) / num_cores(kind) / (per_step * _PRODUCT_FLOPS[kind])
    weight[loop.start : loop.end] = steps
  else:
    weight[loop.start : loop.end] = loop.trips
  return float(weight.sum()), int((weight * products).sum())


def _labels(
  clock: Clock, work: Workload, implementation: str, *, backward: bool
) -> Row:
  return dict(
    device=clock.device.device_kind,
    workload=work.name,
    block_size=work.block_size,
    implementation=implementation,
    direction="forward+backward" if backward else "forward",
  )


def measured(
  clock: Clock, work: Workload, implementation: str, *, backward: bool
) -> Row:
  """A row of the table: one implementation in one direction."""
  kind = clock.device.device_kind
  chip = Chip.of(kind)
  row = _labels(clock, work, implementation, backward=backward)
  try:
    schedule = compiled(clock, work, implementation, backward=backward)
  except Exception as problem:  # what the compiler refuses is a result too
    return row | dict(failed=str(problem)[:300])
  assert schedule.compiled is not None
  parts, total, bundles, roofline = {}, 0.0, 0.0, 0.0
  said = _bytes(schedule)
  product_flops = work.flops / 3
  calls = _calls(schedule)
  for kernel in schedule.kernels:
    cycles, products = _cycles(kernel, work, kind, flops=product_flops)
    most = max(cycles, PRODUCT_CYCLES * products)
    times = calls.get(kernel.name, 1)
    parts[kernel.name] = dict(
      bundles=round(cycles), products=products, cycles=round(most), calls=times
    )
    total += times * most
    bundles += times * cycles
    fetching = said.get(kernel.name, 0) / chip.memory_bytes * chip.cycles
    roofline += max(most, fetching)
  flops = (3 if backward else 1) * work.flops
  if implementation == "one dense FFN":  # its products may be alike too
    counted = sum(part["products"] for part in parts.values())
    counted *= num_cores(kind) * _PRODUCT_FLOPS[kind]
    total *= max(1.0, flops / counted)
    bundles *= max(1.0, flops / counted)
  seconds = total / chip.cycles
  moved = (schedule.compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
  largest = sorted(parts, key=lambda name: -parts[name]["cycles"])
  if implementation == "pallas_tpu":
    row["roofline_ms"] = _rounded(1e3 * roofline / chip.cycles)
    row["roofline_mfu"] = _rounded(
      flops / (roofline / chip.cycles) / chip.flops
    )
  return row | dict(
    milliseconds=_rounded(1e3 * seconds),
    milliseconds_of_bundles=_rounded(1e3 * bundles / chip.cycles),
    mfu=_rounded(flops / seconds / chip.flops),
    hbm_ms=_rounded(1e3 * moved / chip.memory_bytes),
    temporaries_gib=_rounded(gpu_clock.temporaries(schedule.compiled)),
    parts={name: parts[name] for name in largest[:16]},
  )


def _rounded(value: float) -> float:
  return float(f"{value:.4g}")


_HEADER = (
  f"{'device':<12}{'workload':<11}{'Q':>4}  {'implementation':<15}"
  f"{'direction':<18}{'ms':>8}{'MFU':>8}{'HBM ms':>8}{'GiB':>7}"
  "  MFU, each kernel no faster than its bytes"
)


def _line(row: Row) -> str:
  start = (
    f"{row['device']:<12}{row['workload']:<11}{row['block_size']:>4}"
    f"  {row['implementation']:<15}{row['direction']:<18}"
  )
  if "failed" in row:
    return f"{start}  failed: {row['failed'][:80]}"
  return (
    f"{start}{row['milliseconds']:>8.3g}{row['mfu']:>8.1%}"
    f"{row['hbm_ms']:>8.3g}{row['temporaries_gib']:>7.2f}"
    + (f"{row['roofline_mfu']:>8.1%}" if "roofline_mfu" in row else "")
  )


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  rows = _rows_of(_OUTPUT.value)
  print(_HEADER, flush=True)
  clocks = {topology: Clock(topology) for topology in TOPOLOGIES}
  for name in _ONLY.value or IMPLEMENTATIONS:
    for clock, work, backward in itertools.product(
      clocks.values(), WORKLOADS, (False, True)
    ):
      if work.block_size < 256 and name != "pallas_tpu":
        continue
      labels = _labels(clock, work, name, backward=backward)
      row = next((row for row in rows if labels.items() <= row.items()), None)
      if row is None:
        row = measured(clock, work, name, backward=backward)
        rows.append(row)
        _write(rows)
      print(_line(row), flush=True)


def _rows_of(path: str | None) -> list[Row]:
  """Those of a run that was broken off, with which this one goes on."""
  if not path or not pathlib.Path(path).exists():
    return []
  return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["rows"]


def _write(rows: list[Row]) -> None:
  gpu_clock.write_report(
    _OUTPUT.value,
    benchmark="expert_ffn_tpu",
    libtpu=importlib.metadata.version("libtpu"),
    loads={
      f"{work.name}, Q={work.block_size}": work.loads.tolist()
      for work in WORKLOADS
    },
    rows=rows,
  )


if __name__ == "__main__":
  app.run(main)
